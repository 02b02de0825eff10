"""The demo GPT-2: its sizes, its tokenizer, and its instructed operations as a ``Recipe``.

Owns the model and the loss; knows neither how documents are drawn nor how a run is stored.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from trainer.demos.pretrain.backbone import load_tokenizer, save_tokenizer
from trainer.demos.pretrain.gpt2_documents import (
    DART_OPERATIONS,
    E2E_OPERATIONS,
    TokenDocument,
    document,
    draw,
    tokenize,
)
from trainer.demos.pretrain.tables import Corpora, batches, proper_names

END: Final = "<|endoftext|>"
VOCABULARY, LAYERS, HIDDEN, HEADS, WINDOW = 2048, 4, 256, 8, 512
CHUNK = 4096  # documents drawn, tokenised and sorted by length at a time
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Gpt2Recipe:
    """Operations on E2E and DART, half of them named by an instruction."""

    corpora: Corpora
    held_out: Corpora
    names: Sequence[str]
    family: str = "gpt2"
    peak_rate: float = 2e-3
    warmup_steps: int = 100
    published: Mapping[str, Any] = field(default_factory=lambda: {"activation_function": "gelu_new"})

    def describe(self) -> str:
        return f"{self.corpora}; held out: {self.held_out}"

    def train_tokenizer(self, folder: Path) -> Any:
        return train_tokenizer(tokenizer_texts(self.corpora), folder)

    def build_model(self, tokenizer: Any) -> Any:
        return build_model(tokenizer.eos_token_id)

    def chunk(self, tokenizer: Any, rng: random.Random, fraction: float) -> list[list[TokenDocument]]:
        drawn = [draw(self.corpora, self.names, rng) for _ in range(CHUNK)]
        return list(batches(tokenize(tokenizer, drawn, WINDOW), lambda one: len(one.ids), BATCH_TOKENS, rng))

    def loss(self, model: Any, batch: Sequence[TokenDocument]) -> tuple[Tensor, int]:
        return loss_of(model, batch)

    def validate(self, model: Any, tokenizer: Any) -> dict[str, float]:
        return validation(model, tokenizer, self.held_out)


def gpt2_recipe(corpora: Corpora, held_out: Corpora, seed: int) -> Gpt2Recipe:
    """Make the recipe, with names invented from ``seed``."""
    return Gpt2Recipe(corpora, held_out, proper_names(corpora.e2e, corpora.dart, random.Random(seed)))


def tokenizer_texts(corpora: Corpora) -> list[str]:
    """Return the tokenizer's training texts: every text, DART's three times, and the instructions."""
    texts = [text for pair in [*corpora.e2e, *[*corpora.dart] * 3] for text in (pair.source, pair.target)]
    return texts + [name for name in [*E2E_OPERATIONS, *DART_OPERATIONS] if name] * 1000


def train_tokenizer(texts: Iterable[str], folder: Path) -> Any:
    """Train a byte-level BPE on ``texts``, save it to ``folder``, and load it as a server will."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCABULARY, min_frequency=2, special_tokens=[END], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END)
    tokenizer = GPT2TokenizerFast.from_pretrained(str(folder), model_max_length=WINDOW, **special)
    save_tokenizer(tokenizer, folder)
    return load_tokenizer(folder)


def build_model(end: int) -> Any:
    """Make an untrained GPT-2 without dropout. Its fused tanh-GELU is a faster ``gelu_new``, which the export names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", bos_token_id=end, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def loss_of(model: Any, batch: Sequence[TokenDocument]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the learnt tokens and their number. Only learnt tokens get logits.

    The right padding needs no mask: the causal mask hides it from every real token.
    """
    longest = max(len(doc.ids) for doc in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    learnt = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, doc in enumerate(batch):
        ids[row, : len(doc.ids)] = torch.tensor(doc.ids)
        learnt[row, doc.start : len(doc.ids)] = True
    hidden = model.transformer(ids, use_cache=False).last_hidden_state[:, :-1]  # (rows, longest - 1, hidden)
    targets = ids[:, 1:][learnt[:, 1:]]
    logits = model.lm_head(hidden[learnt[:, 1:]])  # (learnt, vocabulary)
    return functional.cross_entropy(logits, targets, reduction="sum"), targets.numel()


@torch.no_grad()
def validation(model: Any, tokenizer: Any, held_out: Corpora, per_operation: int = 128) -> dict[str, float]:
    """Return mean losses per learnt token on held-out pairs, by operation, with its instruction."""
    rng = random.Random(0)
    losses = {}
    for operation in ("table-to-text:", "text-to-table:", "triples-to-text:"):
        wanted = held_out.dart if operation == "triples-to-text:" else held_out.e2e
        chosen = rng.sample(wanted, min(per_operation, len(wanted)))
        docs = tokenize(tokenizer, [document(pair, operation, instructed=True) for pair in chosen], WINDOW)
        sums = [loss_of(model, batch) for batch in batches(docs, lambda one: len(one.ids), 4096, rng)]
        losses[operation] = float(sum(loss for loss, _ in sums)) / sum(count for _, count in sums)
    return losses
