"""A registry's identity: its random id, whether it is being restored, and whether it is closed.

Owns the JSON that a store keeps of itself. The id tells a registry from another one, and an emptied registry from a new
one. Only the handle that restores a registry can use it meanwhile.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from prefixes.errors import RegistryRestoring, RegistryUnavailable, WrongRegistry
from prefixes.spec_json import canonical_json

FORMAT: Final = 1


def check_id(found: str, expected: str | None) -> None:
    """Raise WrongRegistry unless ``found`` is the expected registry id; None accepts any."""
    if expected is not None and found != expected:
        raise WrongRegistry(
            f"registry id: expected {expected}, got {found}: another registry, "
            "or one made anew after its data was lost",
            expected=expected,
            got=found,
        )


@dataclass(frozen=True)
class Mark:
    """What a registry says of itself. ``closed`` stays once a key was made: without a key nobody gets in any more."""

    id: str
    restoring: bool = False
    closed: bool = False


def mark_to_json(mark: Mark) -> bytes:
    """The JSON that a store keeps of itself."""
    flags = {name: True for name in ("restoring", "closed") if getattr(mark, name)}
    return canonical_json({"format": FORMAT, "id": mark.id, **flags}).encode()


def mark_from_json(data: bytes, *, restoring: bool) -> Mark:
    """What ``data`` says.

    Raises RegistryUnavailable for another form, and RegistryRestoring for a registry that is being restored unless
    ``restoring``.
    """
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT:
            raise RegistryUnavailable(f"registry: expected format {FORMAT}, got {str(raw['format'])[:40]}")
        mark = Mark(str(raw["id"]), bool(raw.get("restoring")), bool(raw.get("closed")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RegistryUnavailable(f"registry: its id: {type(error).__name__}: {str(error)[:200]}") from None
    if mark.restoring and not restoring:
        raise RegistryRestoring("registry: it is being restored; if that was cut short, restore it again")
    return mark
