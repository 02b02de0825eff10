"""Makes small backbones, data and runs for the trainer's tests. Knows no test."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefixes.backbone import Backbone, load_backbone
from prefixes.spec import PrefixSpec
from server.engine.kernels.dense import DenseKernels
from server.engine.models import Model, load_model
from tests.support.bart import save_tiny_bart
from tests.support.llama import KINDS, tiny_llama
from tests.support.prefixes import save_tiny_gpt2
from tests.support.t5 import KINDS as T5_KINDS
from tests.support.t5 import tiny_t5
from trainer.data.dataset import Dataset, Example
from trainer.data.sequences import Batch, Ragged, TokenExample, tokenize
from trainer.training.config import TrainConfig
from trainer.training.forward import forward_hidden
from trainer.training.loop import Trainer
from trainer.training.plan import plan_prefix
from trainer.training.reparam import PrefixKV

TEMPLATE = "{input}<|endoftext|>"
BART_TEMPLATE = "<s>{input}</s>"
T5_TEMPLATE = "item : {input}"
FAMILIES: dict[str, Callable[[Path], Any]] = {"gpt2": save_tiny_gpt2, "bart": save_tiny_bart}


def tiny_backbone(folder: Path, dtype: torch.dtype = torch.float64, family: str = "gpt2") -> Backbone:
    """A random GPT-2 of two layers, BART of two and three, or kind of Llama or T5, saved to ``folder`` and loaded back.
    """
    if family in KINDS:
        return tiny_llama(folder, family, dtype)
    if family in T5_KINDS:
        return tiny_t5(folder, family, dtype)
    FAMILIES[family](folder)
    return load_backbone(str(folder), dtype=dtype)


def toy_plan(backbone: Backbone, config: TrainConfig) -> PrefixSpec:
    """The plan of a run, with the template that the toy data goes into."""
    template = {"bart": BART_TEMPLATE, "t5": T5_TEMPLATE}.get(backbone.spec.family, TEMPLATE)
    return plan_prefix(config, backbone, template)


def tiny_model(backbone: Backbone) -> Model:
    return load_model(backbone, DenseKernels())


def forward_logits(model: Model, batch: Batch, prefix: PrefixKV, plan: PrefixSpec | None) -> Tensor:
    """``(learnt, vocab)`` logits where the batch learns, all at once."""
    return model.logits(forward_hidden(model, batch, prefix, plan))


def toy_pairs(count: int = 24) -> list[dict[str, str]]:
    """A task that can be learnt: the answer depends on one word of the input."""
    rng = random.Random(0)
    pairs = []
    for index in range(count):
        kind = rng.choice(["cheap", "dear"])
        pairs.append({"input": f"item {index} {kind}", "target": "yes" if kind == "cheap" else "no no"})
    return pairs


def write_jsonl(path: Path, pairs: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def toy_data(count: int = 24) -> Dataset:
    pairs = enumerate(toy_pairs(count), 1)
    return Dataset(tuple(Example(number, pair["input"], pair["target"]) for number, pair in pairs), "sha256:0")


def toy_examples(backbone: Backbone, count: int = 24) -> list[TokenExample]:
    return list(tokenize(backbone, toy_plan(backbone, TrainConfig(prefix_length=4)), toy_data(count)).examples)


def toy_trainer(backbone: Backbone, config: TrainConfig, checkpoint: Path | None = None) -> Trainer:
    examples = toy_examples(backbone)
    return Trainer(
        config,
        toy_plan(backbone, config),
        backbone,
        tiny_model(backbone),
        examples[:18],
        examples[18:],
        identity="toy",
        checkpoint=checkpoint,
    )


def transformers_loss(backbone: Backbone, examples: list[TokenExample], batch: Batch) -> Tensor:
    """An encoder-decoder's own loss for ``batch``, with labels as it takes them: all behind the decoder's start."""
    inputs = batch.inputs
    assert inputs is not None
    ids, real = padded(inputs)
    labels = torch.full(padded(batch.read)[0].shape, -100)
    for row, example in enumerate(examples):
        labels[row, : len(example.ids) - 1] = torch.tensor(example.ids[1:])
    loss: Tensor = backbone.model(input_ids=ids, attention_mask=real.long(), labels=labels).loss
    return loss


def padded(read: Ragged) -> tuple[Tensor, Tensor]:
    """The sequences as transformers takes them, ``(sequences, longest)``, padded on the right; and which are real."""
    rows = read.ids.split(read.lengths)
    ids, real = (pad_sequence(list(parts), True) for parts in (rows, map(torch.ones_like, rows)))
    return ids, real.bool()


def weights_digest(backbone: Backbone) -> str:
    """A digest of every tensor of the backbone, bytes and names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
