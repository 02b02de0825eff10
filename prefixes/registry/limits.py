"""Limits: how much a registry keeps of a version's record.

Owns the numbers and the errors that name them. What an older release stored beyond a limit stays readable; only what
would add to it is refused. Knows no store.
"""

from __future__ import annotations

import json
from typing import Final

from prefixes.errors import LimitReached
from prefixes.registry.base import VersionInfo

RECORD_BYTES: Final = 256 << 10
"""How much JSON a version's record is, over all publishes of the version."""
RECORD_ENTRIES: Final = 256
"""How many entries it has."""


def check_record(task: str, info: VersionInfo) -> None:
    """Raise LimitReached for a record that is larger than a version keeps. ``task`` is for the message."""
    size = len(json.dumps(dict(info.record)))
    for what, most, got in (("entries", RECORD_ENTRIES, len(info.record)), ("bytes of JSON", RECORD_BYTES, size)):
        if got > most:
            raise LimitReached(
                f"task {task}: record of {info.version}: expected at most {most} {what} over all uploads of the "
                f"version, got {got}",
                expected=most,
                got=got,
            )
