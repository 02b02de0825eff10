"""Copies of a tokenizer's backend for one kind of text each: trusted, with special tokens, and a user's, without.

Owns what keeps a user's text from naming a special token; knows no template. Torch-free.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Backends:
    """``literal`` recognises special tokens, ``plain`` splits them. Neither cuts a text or fills it up."""

    literal: Any
    plain: Any

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Backends:
        """Copies of the backend that is ``described`` as ``tokenizers`` saves it."""
        literal, plain = _made(described), _made(_without_special_pieces(described))
        literal.encode_special_tokens, plain.encode_special_tokens = False, True
        return cls(literal, plain)


def _made(described: Mapping[str, Any]) -> Any:
    backend = Tokenizer.from_str(json.dumps(described))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_special_pieces(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tokenizer of kind Unigram without its special tokens among the pieces of a text; any other as it is.

    Such a vocabulary (T5's) lists special tokens as pieces, the likeliest of all. A text that names one would get it,
    whatever ``encode_special_tokens`` says. Ids stay: each special piece gets a name that no text can have.
    """
    model, added = described["model"], described["added_tokens"]
    if model["type"] != "Unigram":
        return described
    special = {token["id"] for token in added if token["special"]}
    vocabulary = [
        [f"{place} {secrets.token_hex(16)}", score] if place in special else [piece, score]
        for place, (piece, score) in enumerate(model["vocab"])
    ]
    plain = [token for token in added if not token["special"]]
    return {**described, "added_tokens": plain, "model": {**model, "vocab": vocabulary}}
