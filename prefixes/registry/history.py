"""The history of an alias: what it says, where a rollback goes, and how much of it is kept.

Owns these rules; knows no task and no store. A history reads as a stack: a publish or a promote pushes a version, a
rollback pops one. Two rollbacks go two versions back, and never to and fro. A version that was rolled back comes back
only by a promote.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from prefixes.registry.base import HistoryEntry
from prefixes.registry.limits import HISTORY_KEPT


def effective_versions(history: Sequence[HistoryEntry]) -> list[str]:
    """The stack after ``history``, oldest first; the alias points at its last version."""
    return [entry.version for entry in _stack(history)]


def rollback_entries(history: Sequence[HistoryEntry], versions: Container[str], at: str) -> list[HistoryEntry]:
    """The entries of a rollback at the time ``at``; none where there is no earlier version.

    A rollback goes past versions that are not among ``versions``, since they were deleted, with an entry for each.
    """
    *below, current = effective_versions(history)
    for number, version in enumerate(reversed(below), 1):
        if version in versions and version != current:
            return [HistoryEntry(passed, at, "rollback") for passed in reversed(below[-number:])]
    return []


def trimmed(history: Sequence[HistoryEntry]) -> tuple[HistoryEntry, ...]:
    """``history`` within HISTORY_KEPT entries: the latest ones, behind the newest of what they roll back to."""
    if len(history) <= HISTORY_KEPT:
        return tuple(history)
    latest = HISTORY_KEPT // 2 - 1  # these may all be rollbacks, and one version must be left below them
    return (*_stack(history[:-latest])[-(latest + 1) :], *history[-latest:])


def _stack(history: Sequence[HistoryEntry]) -> list[HistoryEntry]:
    stack: list[HistoryEntry] = []
    for entry in history:
        if entry.action == "rollback":
            stack.pop()
        else:
            stack.append(entry)
    return stack
