"""What every contender serves: a backbone of GPT-2-small geometry with random weights, prompts, random prefixes.

Owns the numbers of the comparison; knows no contender.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from prefixes.artifact import Prefix
from prefixes.spec import BackboneSpec, PrefixSpec, SitePrefix

PROMPT_TOKENS = 40
NEW_TOKENS = 64


def save_backbone(folder: Path) -> None:
    """GPT-2 small with random weights and no end token, so that every row gives all its tokens.

    The tokenizer has the right size and one token for every byte; prompts of letters have as many tokens as letters.
    """
    config = GPT2Config(bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    vocabulary = [*letters, *(f"Ġword{index}" for index in range(config.vocab_size - len(letters)))]
    tokenizer = GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[],
        unk_token=None, bos_token=None, eos_token=None,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def prompts(rows: int, seed: int, vocab_size: int = 50257) -> list[list[int]]:
    """Random token ids, others for every repetition; more rows begin with the same ones."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(rows)]


def text_prompts(rows: int, seed: int) -> list[str]:
    """The same in letters, for HTTP."""
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_letters, k=PROMPT_TOKENS)) for _ in range(rows)]


def random_prefix(backbone: BackboneSpec, length: int, seed: int) -> Prefix:
    """Keys and values of ``length`` virtual positions."""
    generator = torch.Generator().manual_seed(seed)
    geometry = backbone.sites["decoder"]
    shape = (geometry.layers, length, geometry.kv_heads, geometry.head_dim)
    tensors = {f"decoder.{part}": torch.randn(shape, generator=generator) for part in ("key", "value")}
    spec = PrefixSpec(backbone.fingerprint, {"decoder": SitePrefix(length, "shifted", geometry, "float32")})
    return Prefix(spec, tensors)
