"""A registry's identity: its random id, and whether it is being restored.

Owns the JSON that a store keeps of itself. The id tells a registry from another one, and an emptied registry from a new
one. Only the handle that restores a registry can use it meanwhile.
"""

from __future__ import annotations

import json
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


def registry_json(registry_id: str, restoring: bool) -> bytes:
    """The JSON that a store keeps of itself."""
    return canonical_json({"format": FORMAT, "id": registry_id, **({"restoring": True} if restoring else {})}).encode()


def registry_from_json(data: bytes, *, restoring: bool) -> tuple[str, bool]:
    """The id in ``data``, and whether the registry is being restored.

    Raises RegistryUnavailable for another form, and RegistryRestoring unless ``restoring``.
    """
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT:
            raise RegistryUnavailable(f"registry: expected format {FORMAT}, got {str(raw['format'])[:40]}")
        found, unfinished = str(raw["id"]), bool(raw.get("restoring"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RegistryUnavailable(f"registry: its id: {type(error).__name__}: {str(error)[:200]}") from None
    if unfinished and not restoring:
        raise RegistryRestoring("registry: it is being restored; if that was cut short, restore it again")
    return found, unfinished
