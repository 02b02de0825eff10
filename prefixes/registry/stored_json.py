"""A task's JSON in the bytes that stores keep, and back.

Owns the format's number and what is wrong with bytes that are no task. Knows no store and not what the JSON says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from prefixes.errors import PrefixdError, RegistryUnavailable
from prefixes.registry.identity import FORMAT

_T = TypeVar("_T")


def encoded(raw: Mapping[str, Any]) -> bytes:
    """A task's JSON in the bytes that stores keep."""
    return json.dumps({"format": FORMAT, **raw}, indent=1, sort_keys=True).encode()


def parsed(data: bytes, from_dict: Callable[[Any], _T], where: str) -> _T:
    """The value that ``from_dict`` makes of a stored JSON. Raises RegistryUnavailable, which names ``where``."""
    try:
        raw = json.loads(data)
        found = from_dict(raw)
        if raw["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {str(raw['format'])[:40]}")
    except (ValueError, KeyError, TypeError, RecursionError, PrefixdError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise RegistryUnavailable(f"registry: {where} is no task index: {reason}") from None
    return found
