"""A task's JSON in the bytes that stores keep, and back, or its aliases alone.

Owns the format's number and what is wrong with bytes that are no task. Knows no store and not what the JSON says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from prefixes.errors import InvalidName, PrefixdError, RegistryUnavailable
from prefixes.registry.identity import FORMAT
from prefixes.spec import check_version

HEAD_BYTES: Final = 32 << 10
"""A task's JSON begins with its aliases, whose names and digests are fewer bytes than these."""

_T = TypeVar("_T")
_BEGINNING: Final = '{\n "aliases": '
_NEXT: Final = f',\n "format": {FORMAT},'


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


def aliases_at_head(data: bytes) -> dict[str, str] | None:
    """The aliases in the first bytes of a task's JSON, None where they do not stand there as in ``encoded``."""
    text = data.decode("ascii", errors="replace")
    if not text.startswith(_BEGINNING):
        return None
    try:
        found, end = json.JSONDecoder().raw_decode(text, len(_BEGINNING))
        if not text.startswith(_NEXT, end):
            return None
        return {str(alias): check_version(version) for alias, version in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError, InvalidName):
        return None
