"""Small backbones, data and runs for the trainer's tests."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import torch

from prefixes.backbone import Backbone, load_backbone
from server.engine.kernels.torch_reference import TorchKernels
from server.engine.models import Model, load_model
from tests.support.prefixes import save_tiny_gpt2
from trainer.config import TrainConfig
from trainer.data import Dataset, Example, TokenExample, tokenize
from trainer.loop import Trainer

CORPORA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TEMPLATE = "{input}<|endoftext|>"


def tiny_backbone(folder: Path, dtype: torch.dtype = torch.float64) -> Backbone:
    """A random GPT-2 of two layers, saved to ``folder`` and loaded back."""
    save_tiny_gpt2(folder)
    return load_backbone(str(folder), dtype=dtype)


def tiny_model(backbone: Backbone) -> Model:
    return load_model(backbone, TorchKernels())


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


def toy_examples(backbone: Backbone, count: int = 24) -> list[TokenExample]:
    examples = tuple(Example(i, pair["input"], pair["target"]) for i, pair in enumerate(toy_pairs(count), 1))
    made, _ = tokenize(backbone.prompt_encoder, TEMPLATE, backbone.eos_token_ids[0], Dataset(examples, "sha256:0"), 60)
    return made


def toy_trainer(backbone: Backbone, config: TrainConfig, checkpoint: Path | None = None) -> Trainer:
    examples = toy_examples(backbone)
    return Trainer(
        config, backbone, tiny_model(backbone), examples[:18], examples[18:], identity="toy", checkpoint=checkpoint
    )


def weights_digest(backbone: Backbone) -> str:
    """A digest of every tensor of the backbone, bytes and names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
