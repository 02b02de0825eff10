"""The demo BART: its sizes, its tokenizer, and its denoising as a ``Recipe``.

Owns the model and the loss; knows neither how documents are drawn nor how a run is stored.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from trainer.demos.pretrain.backbone import load_tokenizer, save_tokenizer
from trainer.demos.pretrain.bart_documents import SEPARATOR, Document, Example, document, draw, encode
from trainer.demos.pretrain.tables import Corpora, batches, proper_names

SPECIAL: Final = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the first four have BART's ids 0 to 3
START, PADDING, END, UNKNOWN = range(4)
VOCABULARY, LAYERS, HIDDEN, HEADS, FEED_FORWARD, WINDOW = 3072, 3, 256, 8, 1024, 512
CHUNK = 1024  # documents drawn, tokenised and sorted by length at a time
INITIAL_DEVIATION = 0.04  # with BART's 0.02, a hidden size of 256 starts with nearly uniform attention
BATCH_TOKENS = 2048  # of encoder and decoder together


@dataclass(frozen=True)
class BartRecipe:
    """Denoising of E2E, DART and SciTLDR."""

    corpora: Corpora
    held_out: Corpora
    names: Sequence[str]
    family: str = "bart"
    peak_rate: float = 1e-3
    warmup_steps: int = 200
    published: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        return f"{self.corpora}; held out: {self.held_out}"

    def train_tokenizer(self, folder: Path) -> Any:
        return train_tokenizer(tokenizer_texts(self.corpora), folder)

    def build_model(self, tokenizer: Any) -> Any:
        return build_model(len(tokenizer))

    def chunk(self, tokenizer: Any, rng: random.Random, fraction: float) -> list[list[Example]]:
        drawn = [draw(self.corpora, self.names, rng, fraction) for _ in range(CHUNK)]
        return list(batches(encode(tokenizer, drawn, WINDOW, rng), lambda one: one.size, BATCH_TOKENS, rng))

    def loss(self, model: Any, batch: Sequence[Example]) -> tuple[Tensor, int]:
        return loss_of(model, batch)

    def validate(self, model: Any, tokenizer: Any) -> dict[str, float]:
        return validation(model, tokenizer, self.held_out)


def bart_recipe(corpora: Corpora, held_out: Corpora, seed: int) -> BartRecipe:
    """Make the recipe, with names invented from ``seed``."""
    return BartRecipe(corpora, held_out, proper_names(corpora.e2e, corpora.dart, random.Random(seed)))


def tokenizer_texts(corpora: Corpora) -> list[str]:
    """Return the tokenizer's training texts: every text, the smaller corpora several times, and the separator."""
    repeated = [*corpora.e2e, *[*corpora.dart] * 3, *[*corpora.scitldr] * 4]
    return [text for pair in repeated for text in (pair.source, pair.target)] + [SEPARATOR] * 1000


def train_tokenizer(texts: Sequence[str], folder: Path) -> Any:
    """Train a byte-level BPE with BART's special tokens, save it to ``folder``, and load it as a server will."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    from transformers import BartTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCABULARY, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    mask = AddedToken("<mask>", lstrip=True, special=True, normalized=False)
    save_tokenizer(BartTokenizerFast.from_pretrained(str(folder), model_max_length=WINDOW, mask_token=mask), folder)
    return load_tokenizer(folder)


def build_model(vocabulary: int) -> Any:
    """Make an untrained BART. It has no dropout, since the budget is about one pass over E2E."""
    from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

    config = BartConfig(
        vocab_size=vocabulary, max_position_embeddings=WINDOW, d_model=HIDDEN, encoder_layers=LAYERS,
        decoder_layers=LAYERS, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        encoder_ffn_dim=FEED_FORWARD, decoder_ffn_dim=FEED_FORWARD, dropout=0.0, activation_function="gelu",
        bos_token_id=START, pad_token_id=PADDING, eos_token_id=END, decoder_start_token_id=END,
        forced_eos_token_id=END, init_std=INITIAL_DEVIATION,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    align(model)
    model.generation_config = GenerationConfig(
        bos_token_id=START, pad_token_id=PADDING, eos_token_id=END, decoder_start_token_id=END,
        forced_bos_token_id=START, forced_eos_token_id=END,
    )  # fmt: skip
    return model


@torch.no_grad()
def align(model: Any) -> None:
    """Make an untrained decoder attend to similar encoder states, so that it learns to copy within the budget.

    Both sides start with the same sinusoids as positions, which also serve positions that no document has reached. In
    cross-attention the query projection starts as the key projection, so that the score measures similarity.
    """
    encoder, decoder = model.model.encoder, model.model.decoder
    offset = encoder.embed_positions.offset
    sinusoids = _sinusoids(WINDOW, HIDDEN) * (2**0.5 * INITIAL_DEVIATION)  # the deviation of the tokens' embeddings
    for embedding in (encoder.embed_positions, decoder.embed_positions):
        embedding.weight[offset:].copy_(sinusoids)
    for layer in decoder.layers:
        layer.encoder_attn.q_proj.weight.copy_(layer.encoder_attn.k_proj.weight)


def _sinusoids(positions: int, size: int) -> Tensor:
    """Sines and cosines of geometrically falling frequencies, as in "Attention is all you need": (positions, size)."""
    rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    angles = torch.arange(positions)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def loss_of(model: Any, batch: Sequence[Example]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the learnt tokens and their number. Only learnt tokens get logits.

    The decoder reads ``</s>`` and the target without its last token. Its right padding needs no mask: the causal mask
    hides it from every real token.
    """
    longest, widest = max(len(one.corrupted) for one in batch), max(len(one.target) for one in batch)
    inputs = torch.full((len(batch), longest), PADDING)
    targets = torch.full((len(batch), widest), PADDING)
    learnt = torch.zeros(len(batch), widest, dtype=torch.bool)
    for row, one in enumerate(batch):
        inputs[row, : len(one.corrupted)] = torch.tensor(one.corrupted)
        targets[row, : len(one.target)] = torch.tensor(one.target)
        learnt[row, : one.learnt] = True
    started = torch.cat([torch.full((len(batch), 1), END), targets[:, :-1]], dim=1)
    hidden = model.model(
        input_ids=inputs, attention_mask=(inputs != PADDING).long(), decoder_input_ids=started, use_cache=False
    ).last_hidden_state[learnt]  # (learnt, hidden)
    logits = model.lm_head(hidden) + model.final_logits_bias  # (learnt, vocabulary)
    return functional.cross_entropy(logits, targets[learnt], reduction="sum"), int(learnt.sum())


@torch.no_grad()
def validation(model: Any, tokenizer: Any, held_out: Corpora, per_measure: int = 32) -> dict[str, float]:
    """Return mean losses per token on held-out pairs, by corpus.

    ``denoising`` restores whole documents under infilling and permutation. ``text`` writes only a text or summary; its
    mask stands before its table or abstract.
    """
    losses = {}
    for corpus, pairs in (("e2e", held_out.e2e), ("dart", held_out.dart), ("scitldr", held_out.scitldr)):
        rng = random.Random(0)
        chosen = rng.sample(pairs, min(per_measure, len(pairs)))
        noised = encode(tokenizer, [document(pair, "both", rng) for pair in chosen], WINDOW, rng)
        parts = [(pair.target, pair.source) for pair in chosen]
        hidden = encode(tokenizer, [Document(part, part, 0) for part in parts], WINDOW, rng)
        losses[f"{corpus} denoising"] = _mean_loss(model, noised)
        losses[f"{corpus} text"] = _mean_loss(model, [_first_part(one) for one in hidden])
    return {name: loss for name, loss in losses.items() if loss is not None}


def _mean_loss(model: Any, examples: Sequence[Example]) -> float | None:
    sums = [loss_of(model, batch) for batch in batches(examples, lambda one: one.size, BATCH_TOKENS, random.Random(0))]
    return float(sum(loss for loss, _ in sums)) / sum(count for _, count in sums) if examples else None


def _first_part(one: Example) -> Example:
    """Limit the loss to ``<s>``, the hidden first part and the separator: the input shows the rest."""
    return replace(one, learnt=len(one.target) - len(one.corrupted) + 3)
