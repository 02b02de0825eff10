"""Deleted tasks: when they were deleted, the names they are kept under, how long, and in which order they are told.

Owns the values; knows no store.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from prefixes.registry.base import DeletedTask, TaskInfo


def buried_now(task: TaskInfo) -> DeletedTask:
    """``task`` as it goes among the deleted."""
    return DeletedTask(datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"), task)


def buried_key(item: DeletedTask) -> str:
    """The name of a deleted task within its tenant: as many as were deleted under one name, each with its time."""
    return f"{item.task.name}@{re.sub('[^0-9A-Z]', '', item.deleted_at)}"


def is_past(item: DeletedTask, retention_s: float) -> bool:
    """Whether ``item`` was deleted at least ``retention_s`` ago."""
    return datetime.now(UTC) - datetime.fromisoformat(item.deleted_at) >= timedelta(seconds=retention_s)


def latest_first(items: list[DeletedTask]) -> list[DeletedTask]:
    """As ``Store.deleted`` lists them."""
    return sorted(items, key=lambda item: item.deleted_at, reverse=True)
