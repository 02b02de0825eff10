"""Makes tiny random BARTs with a real tokenizer, and prefixes for any of their sites. Knows no test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BartConfig, BartForConditionalGeneration, BartTokenizer, PreTrainedTokenizerFast

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.spec import INPUT_SLOT, SITES, BackboneSpec, Positions, PrefixSpec, Site, SitePrefix
from tests.support.prefixes import CORPUS

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
VOCAB_SIZE = 320
EVERY_SITE = SITES


def save_tiny_bart_tokenizer(folder: Path, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE as BART folders have it: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS], show_progress=False)
    state = json.loads(trained.to_str())["model"]
    tokenizer: PreTrainedTokenizerFast = BartTokenizer(
        vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_bart_model(
    *,
    layers: tuple[int, int] = (2, 3),
    window: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = VOCAB_SIZE,
    logits_bias: bool = False,
    **config: Any,
) -> Any:
    """A random BART of ``layers`` (encoder, decoder), every norm and bias random too, that says more than one word.

    ``logits_bias`` gives the head a bias as well; it is zero in the published checkpoints.
    """
    settings = {
        "vocab_size": vocab_size, "d_model": 32, "encoder_layers": layers[0], "decoder_layers": layers[1],
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64,
        "max_position_embeddings": window, "init_std": 0.12, "activation_function": "gelu",
    }  # fmt: skip
    torch.manual_seed(seed)
    model: Any = BartForConditionalGeneration(BartConfig(**{**settings, **config})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):  # of any sign: else a token's likeliest successor is itself
                parameter.normal_()
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "shared" in name or "embed_positions" in name:  # as loud as the layers behind them
                parameter.mul_(2.5)
        if logits_bias:
            model.final_logits_bias.normal_(std=0.3)
    return model.requires_grad_(False)


def save_tiny_bart(
    folder: Path, *, generation: Mapping[str, Any] | None = None, tokens: int = 300, **model: Any
) -> Any:
    """``tiny_bart_model(**model)`` saved to ``folder`` with a tokenizer; ``generation`` adds to its own config."""
    save_tiny_bart_tokenizer(folder, tokens)
    made = tiny_bart_model(**model)
    for key, value in (generation or {}).items():
        setattr(made.generation_config, key, value)
    made.save_pretrained(folder)
    return made


def tiny_bart(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Backbone:
    """``save_tiny_bart(folder, **options)``, loaded back."""
    save_tiny_bart(folder, **options)
    return load_backbone(str(folder), dtype=dtype)


def random_bart_prefix(
    spec: BackboneSpec,
    sites: Sequence[Site] = EVERY_SITE,
    length: int | Mapping[Site, int] = 3,
    positions: Positions | Mapping[Site, Positions] = "unshifted",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    template: str = INPUT_SLOT,
    defaults: Mapping[str, Any] | None = None,
) -> Prefix:
    """A valid random prefix on ``sites``; ``length`` and ``positions`` for all of them or for each.

    Cross-attention's is unshifted, whatever ``positions`` says for all: it has no other.
    """
    generator = torch.Generator().manual_seed(seed)
    name: Any = str(dtype).removeprefix("torch.")
    sited, tensors = {}, {}
    for site in sites:
        geometry = spec.sites[site]
        count = length if isinstance(length, int) else length[site]
        counted = positions[site] if isinstance(positions, Mapping) else "unshifted" if site == "cross" else positions
        sited[site] = SitePrefix(count, counted, geometry, name)
        for part in ("key", "value"):
            shape = (geometry.layers, count, geometry.kv_heads, geometry.head_dim)
            tensors[f"{site}.{part}"] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return Prefix(PrefixSpec(spec.fingerprint, sited, template, dict(defaults or {})), tensors)
