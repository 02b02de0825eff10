"""The space that a tokenizer puts before a text: SentencePiece's ``▁``, byte-level BPE's ``add_prefix_space``.

Owns where a tokenizer's description says so, and the description of the same tokenizer without it. Knows no prompt.

A tokenizer that drops the spaces of a text and begins every word with one of its own (T5's) is left as it is: there the
space is between words.
"""

from __future__ import annotations

import copy
from typing import Any, Final

_SWITCHES: Final = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


def without_leading_space(described: dict[str, Any]) -> dict[str, Any]:
    """The description (``Tokenizer.to_str``, parsed) of a tokenizer that puts no space before a text."""
    changed = copy.deepcopy(described)
    normalizer = changed["normalizer"] or {}
    if normalizer.get("type") == "Prepend":
        changed["normalizer"] = None
    elif steps := normalizer.get("normalizers"):
        normalizer["normalizers"] = [step for step in steps if step["type"] != "Prepend"]
    if splitter := changed["pre_tokenizer"]:
        first = splitter.get("pretokenizers", [splitter])[0]
        first.update(_SWITCHES.get(first["type"], {}))
    return changed
