"""Makes small random prefixes and backbones for tests: valid ones of any geometry. Knows no test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from prefixes.artifact import Prefix
from prefixes.spec import INPUT_SLOT, BackboneSpec, Positions, PrefixSpec, Site, SiteGeometry, SitePrefix

FINGERPRINT = "sha256:" + "ab" * 32


def make_backbone_spec(
    *, layers: int = 2, kv_heads: int = 2, head_dim: int = 4, fingerprint: str = FINGERPRINT
) -> BackboneSpec:
    """A GPT-2-like spec without a model behind it."""
    return BackboneSpec(
        family="gpt2",
        sites={"decoder": SiteGeometry(layers, kv_heads, head_dim)},
        hidden_size=kv_heads * head_dim,
        vocab_size=100,
        max_positions=64,
        fingerprint=fingerprint,
    )


def make_encoder_decoder_spec(*, encoder_layers: int = 3, decoder_layers: int = 2) -> BackboneSpec:
    """A BART-like spec without a model behind it; its encoder is deeper than its decoder."""
    decoder = SiteGeometry(decoder_layers, 2, 4)
    return BackboneSpec(
        family="bart",
        sites={"decoder": decoder, "encoder": SiteGeometry(encoder_layers, 2, 4), "cross": decoder},
        hidden_size=8,
        vocab_size=100,
        max_positions=64,
        fingerprint=FINGERPRINT,
    )


def make_prefix(
    backbone: BackboneSpec | None = None,
    *,
    length: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sites: tuple[Site, ...] = ("decoder",),
    positions: Positions = "shifted",
    template: str = INPUT_SLOT,
    defaults: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Prefix:
    """A valid random prefix for ``backbone`` (or a tiny one): the same content for the same arguments.

    Cross-attention's is unshifted, whatever ``positions`` says: it has no other.
    """
    backbone = backbone or make_backbone_spec()
    generator = torch.Generator().manual_seed(seed)
    name = str(dtype).removeprefix("torch.")
    sited, tensors = {}, {}
    for site in sites:
        geometry = backbone.sites.get(site) or next(iter(backbone.sites.values()))
        sited[site] = SitePrefix(length, "unshifted" if site == "cross" else positions, geometry, name)
        for part in ("key", "value"):
            shape = (geometry.layers, length, geometry.kv_heads, geometry.head_dim)
            tensors[f"{site}.{part}"] = torch.randn(shape, generator=generator).to(dtype)
    return Prefix(PrefixSpec(backbone.fingerprint, sited, template, dict(defaults or {}), dict(origin or {})), tensors)


CORPUS = ["name : Blue Spice | Type : coffee shop", "Blue Spice is a coffee shop in the city centre.", "café ☕"] * 4


def save_tiny_tokenizer(folder: Path) -> GPT2Tokenizer:
    """A byte-level BPE of 300 tokens, as a GPT-2 folder has it (its end token among them)."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = GPT2Tokenizer(vocab=state["vocab"], merges=merges)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_tiny_gpt2(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> GPT2LMHeadModel:
    """A random GPT-2 with its tokenizer, saved to ``folder``; weights large enough that attention matters."""
    tokenizer = save_tiny_tokenizer(folder)
    end = tokenizer.eos_token_id
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": 304, "initializer_range": 0.3}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": end, "eos_token_id": end, **config})).to(dtype)
    model.save_pretrained(folder)
    return model.eval()
