"""Limits: how much a registry keeps of a tenant, its audit, a task and a version.

Owns the numbers and the errors that name them. What an older release stored beyond a limit stays readable; only what
would add to it is refused. Of histories, publish keys, replaced entries and audits the oldest go. Knows no store.
"""

from __future__ import annotations

import json
import re
from typing import Final

from prefixes.errors import InvalidParameter, LimitReached
from prefixes.registry.base import VersionInfo

RECORD_BYTES: Final = 256 << 10
"""How much JSON a version's record is, over all publishes of the version."""
RECORD_ENTRIES: Final = 256
"""How many entries it has."""
MAX_VERSIONS: Final = 1_000
"""Of a task."""
TASK_BYTES: Final = 16 << 20
"""How much JSON a task is: what its versions say of themselves, with aliases and history. Every change writes it."""
MAX_ALIASES: Final = 100
"""Of a task."""
HISTORY_KEPT: Final = 200
"""How many entries an alias's history has; what a rollback needs of older ones stays."""
MAX_TASKS: Final = 100_000
"""Of a tenant. Publishers at work at the same moment may pass it by as many as they are."""
KEYS_KEPT: Final = 100
"""How many idempotency keys a task remembers: the newest ones."""
REPLACED_KEPT: Final = 16
REPLACED_BYTES: Final = 64 << 10
"""How many replaced entries a version keeps, and how much JSON they take together: the oldest ones."""
NOTE: Final = "^[ -~]{1,500}$"
"""A publish's note in the audit: a line of ASCII."""
AUDIT_KEPT: Final = 10_000
"""How many entries a tenant's audit has, the latest. Redis drops older ones in nodes of a hundred, so it may have more.
"""
AUDIT_BYTES: Final = 8 << 20
"""Of a tenant's audit on disk. A file that grows beyond keeps its latest half."""
_PRUNE: Final = "`prefixd prefixes prune {task} --keep N` makes room"


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


def check_note(note: str) -> None:
    """Raise InvalidParameter for a note that an audit does not keep."""
    if not re.fullmatch(NOTE, note):
        got = repr(note[:80])
        raise InvalidParameter(f"note: expected 1 to 500 printable ASCII characters, got {got}", parameter="note")


def check_versions(task: str, got: int) -> None:
    """Raise LimitReached for more versions than a task keeps."""
    _check(f"task {task}", MAX_VERSIONS, "versions", got, _PRUNE.format(task=task))


def check_task_bytes(task: str, got: int) -> None:
    """Raise LimitReached for a task that is larger than a registry keeps."""
    _check(f"task {task}", TASK_BYTES, "bytes of JSON", got, _PRUNE.format(task=task))


def check_aliases(task: str, got: int) -> None:
    """Raise LimitReached for more aliases than a task keeps."""
    _check(f"task {task}", MAX_ALIASES, "aliases", got, "move one that is there")


def check_tasks(tenant: str, got: int) -> None:
    """Raise LimitReached for more tasks than a tenant has."""
    _check(f"tenant {tenant}", MAX_TASKS, "tasks", got, "`prefixd prefixes delete` makes room")


def _check(whose: str, most: int, what: str, got: int, advice: str) -> None:
    if got > most:
        raise LimitReached(
            f"{whose}: expected at most {most} {what}, got {got}; {advice}", expected=most, got=got
        )
