"""What a store is asked to change: a task's new state, the plan that makes it, and the writer that makes it visible.

Owns these values and the Protocol of a writer. Knows no store and no rule of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from prefixes.registry.base import DeletedTask, TaskInfo
from prefixes.tenancy.limits import Limits


@dataclass(frozen=True)
class Change:
    """What becomes of a task. ``after`` is its new state; None removes it."""

    after: TaskInfo | None
    adds_deleted: TaskInfo | None = None  # what is kept as a deleted task: all of the old state, or one version
    removes_deleted: DeletedTask | None = None  # a deleted task that is one no longer
    adds: bool = False  # brings something new, so that the limit of a task's size counts


@dataclass(frozen=True)
class Edit:
    """A change to make, with its audit entry. ``plan`` may be called several times; it raises the named errors."""

    action: str
    actor: str
    alias: str | None
    plan: Callable[[TaskInfo | None], Change]
    version: str | None = None  # of a publish, or of a delete of one version
    quota: Limits | None = None  # what the tenant may have in all, judged in the step that makes the change
    note: str | None = None  # for the audit


class Writer(Protocol):
    """One writer at work on a tenant."""

    def put(self, version: str, data: bytes) -> None:
        """Store an artifact. No clean-up takes it while this writer is at work, even if no task has it yet."""

    def edit(self, name: str, edit: Edit) -> TaskInfo | None:
        """Make a change whole, together with its audit entry; the task after it."""
