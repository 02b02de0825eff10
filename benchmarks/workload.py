"""The workload of every contender: a backbone of a known geometry with random weights, inputs, random prefixes.

Owns the numbers of the comparison; knows no contender.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)

from prefixes.artifact import Prefix
from prefixes.spec import BackboneSpec, PrefixSpec, Site, SitePrefix


@dataclass(frozen=True)
class Workload:
    """One comparison. ``save`` writes the backbone; each of its rows generates exactly ``new_tokens``."""

    save: Callable[[Path], None]
    input_tokens: int
    new_tokens: int
    rows: tuple[int, ...]
    beams: tuple[int, ...]


def save_gpt2(folder: Path) -> None:
    """Save GPT-2 small with random weights and no end token, so that every row generates all its tokens.

    The tokenizer has the right size and one token for every byte, so that a prompt has one token per letter.
    """
    config = GPT2Config(bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer = GPT2Tokenizer(vocab=_vocabulary(config.vocab_size), merges=[], unk_token=None, bos_token=None,
                              eos_token=None)  # fmt: skip
    tokenizer.save_pretrained(folder)


def save_bart_base(folder: Path) -> None:
    """Save BART base with random weights. Its end token is never the likeliest: every row generates all its tokens."""
    config = BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
        encoder_ffn_dim=3072, decoder_ffn_dim=3072, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config)
    model.final_logits_bias[0, config.eos_token_id] = -1e4
    model.save_pretrained(folder)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    BartTokenizer(vocab=_vocabulary(config.vocab_size, specials), merges=[]).save_pretrained(folder)


def _vocabulary(size: int, specials: list[str] | None = None) -> dict[str, int]:
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    known = [*(specials or []), *letters]
    words = [*known, *(f"Ġword{index}" for index in range(size - len(known)))]
    return {token: index for index, token in enumerate(words)}


WORKLOADS: Final[Mapping[str, Workload]] = {
    "gpt2": Workload(save_gpt2, input_tokens=40, new_tokens=64, rows=(1, 8, 32), beams=(1,)),
    "bart-base": Workload(save_bart_base, input_tokens=256, new_tokens=48, rows=(1, 8, 16), beams=(1, 4)),
}
FIRST_WORD: Final = 5  # lower ids are BART's special tokens


def prompts(work: Workload, rows: int, seed: int, vocab_size: int = 50257) -> list[list[int]]:
    """Return random token ids, different for every ``seed``. More rows begin with the rows of fewer."""
    rng = random.Random(seed)
    return [[rng.randrange(FIRST_WORD, vocab_size) for _ in range(work.input_tokens)] for _ in range(rows)]


def text_prompts(work: Workload, rows: int, seed: int) -> list[str]:
    """Return random letters for HTTP, one token each, different for every ``seed``."""
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_letters, k=work.input_tokens)) for _ in range(rows)]


def random_prefix(backbone: BackboneSpec, length: int, seed: int) -> Prefix:
    """Make random keys and values of ``length`` virtual positions at every site of the backbone."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    sites: dict[Site, SitePrefix] = {}
    positions: Any = "shifted" if len(backbone.sites) == 1 else "unshifted"  # as in the paper
    for site, geometry in backbone.sites.items():
        shape = (geometry.layers, length, geometry.kv_heads, geometry.head_dim)
        tensors |= {f"{site}.{part}": torch.randn(shape, generator=generator) for part in ("key", "value")}
        sites[site] = SitePrefix(length, positions, geometry, "float32")
    return Prefix(PrefixSpec(backbone.fingerprint, sites), tensors)
