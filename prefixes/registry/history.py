"""What an alias's history means: the log of its moves, and the stack of versions that rollbacks walk down.

Owns the rules, the same for every store; knows no store. The log only grows. Replayed, a publish or a promote puts a
version on the stack, a rollback takes one off: rolling back twice goes two versions back, never to and fro, and a
version rolled back from is not returned to unless it is promoted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from prefixes.errors import Conflict
from prefixes.registry.base import HistoryEntry

ACTIONS: Final = ("publish", "promote", "rollback")


def now() -> str:
    """The time as the registry writes it: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def effective_versions(history: Sequence[HistoryEntry]) -> list[str]:
    """The stack after ``history``, oldest first; its last is where the alias points."""
    stack: list[str] = []
    for entry in history:
        if entry.action == "rollback":
            stack.pop()
        else:
            stack.append(entry.version)
    return stack


def moved(history: Sequence[HistoryEntry], version: str, action: str) -> tuple[HistoryEntry, ...]:
    """``history`` after pointing the alias at ``version``; unchanged where it points there already."""
    if history and history[-1].version == version:
        return tuple(history)
    return (*history, HistoryEntry(version, now(), action))


def rolled_back(alias: str, history: Sequence[HistoryEntry]) -> tuple[HistoryEntry, ...]:
    """``history`` after one rollback. Raises Conflict where no earlier version is left."""
    stack = effective_versions(history)
    if len(stack) < 2:
        raise Conflict(
            f"rollback of alias {alias!r}: expected an earlier version, got none before {stack[-1]}",
            alias=alias,
            current=stack[-1],
        )
    return (*history, HistoryEntry(stack[-2], now(), "rollback"))
