"""A request that was refused because of who asked, as it is kept for its tenant. Owns its form; knows no store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from prefixes.errors import RegistryUnavailable

DENIALS_KEPT: Final = 200
"""Of a tenant, and of callers without a key that is known: the latest ones."""
MAX_TEXT: Final = 200
"""Characters of each text."""


@dataclass(frozen=True)
class Denial:
    """``what`` is the task, where it is the caller's own or shared with it. ``count`` above 1 sums up several."""

    at: str  # UTC, ISO 8601
    key: str | None  # the key's id
    action: str  # what was asked: "generate", "publish", …
    route: str
    what: str
    reason: str
    request_id: str
    count: int = 1


def denial_to_dict(denial: Denial) -> dict[str, Any]:
    """As plain JSON values, no text longer than MAX_TEXT."""
    return {name: value[:MAX_TEXT] if isinstance(value, str) else value for name, value in asdict(denial).items()}


def denial_to_json(denial: Denial) -> str:
    """One line."""
    return json.dumps(denial_to_dict(denial), sort_keys=True)


def denials_from_json(lines: Sequence[bytes]) -> list[Denial]:
    """What ``denial_to_json`` wrote, the latest first. Raises RegistryUnavailable for anything else."""
    try:
        raws = [json.loads(line) for line in lines]
        found = [Denial(**{field.name: raw[field.name] for field in fields(Denial)}) for raw in raws]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RegistryUnavailable(f"registry: its denials: {type(error).__name__}: {str(error)[:200]}") from None
    found.reverse()
    return sorted(found, key=lambda denial: denial.at, reverse=True)
