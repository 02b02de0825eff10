"""Strict JSON: what ``json`` takes in silence and other readers read otherwise is an error here. Torch-free.

Owns the parsing alone; each reader has its own named error.
"""

from __future__ import annotations

import json
from typing import Any


def strict_json(text: str | bytes) -> Any:
    """Parse JSON without NaN and Infinity, and with every key once in its object.

    Raises ValueError, a JSONDecodeError where the syntax is wrong. Its message quotes no value.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("lists or objects nested too deeply") from None


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"the constant {text}, which is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key twice in one object")
    return unique
