"""What a registry keeps of a tenant, counted, and the tenant's limits of it.

Owns what counts and the check. A version counts once for each task that has it, with its artifact's bytes, whoever else
has the same content. What is deleted counts as versions and bytes until a clean-up takes it. Knows no store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Final

from prefixes.errors import QuotaExceeded
from prefixes.registry.base import DeletedTask, TaskInfo
from prefixes.registry.changes import Change
from prefixes.tenancy.limits import Limits

LIMITS: Final = ("registry_tasks", "registry_versions", "registry_bytes")
"""The limits of what is counted, in the order of ``Kept``."""


@dataclass(frozen=True)
class Kept:
    """How many tasks and versions there are, and the bytes of their artifacts. Of a change: how many more."""

    tasks: int = 0
    versions: int = 0
    size: int = 0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.tasks + other.tasks, self.versions + other.versions, self.size + other.size)

    def __sub__(self, other: Kept) -> Kept:
        return Kept(self.tasks - other.tasks, self.versions - other.versions, self.size - other.size)


def kept_by(tasks: Iterable[TaskInfo], deleted: Iterable[DeletedTask]) -> Kept:
    """What there is, by counting all of it."""
    kept = Kept()
    for task in tasks:
        kept += _of(task)
    for item in deleted:
        kept += _of_deleted(item.task)
    return kept


def added_by(before: TaskInfo | None, change: Change) -> Kept:
    """What a change adds."""
    removed = change.removes_deleted.task if change.removes_deleted else None
    return _of(change.after) + _of_deleted(change.adds_deleted) - _of(before) - _of_deleted(removed)


def limits_of(quota: Limits) -> tuple[int | None, ...]:
    """The limits in the order of ``Kept``."""
    return tuple(getattr(quota, name) for name in LIMITS)


def check_quota(tenant: str, quota: Limits, kept: Kept, added: Kept) -> None:
    """Raise QuotaExceeded where ``added`` would pass a limit. What adds nothing may stay above one."""
    for name, most, before, more in zip(LIMITS, limits_of(quota), astuple(kept), astuple(added), strict=True):
        if most is not None and more > 0 and before + more > most:
            raise QuotaExceeded(
                f"tenant {tenant}: {name}: expected at most {most}, got {before + more} with this; versions of what is "
                "deleted count until they are cleaned away",
                limit=name, expected=most, got=before + more,
            )  # fmt: skip


def _of(task: TaskInfo | None) -> Kept:
    return Kept(1) + _of_deleted(task) if task else Kept()


def _of_deleted(task: TaskInfo | None) -> Kept:
    return Kept(0, len(task.versions), sum(info.size for info in task.versions)) if task else Kept()
