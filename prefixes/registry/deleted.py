"""Deleted tasks: their time, their key, their retention and their order.

Owns these values; knows no store.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

from prefixes.registry.base import DeletedTask, TaskInfo


def deleted_now(task: TaskInfo) -> DeletedTask:
    """``task`` as it is kept when it is deleted now."""
    return DeletedTask(datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"), task)


def deleted_key(item: DeletedTask) -> str:
    """The key of a deleted task within its tenant: several tasks of one name differ by their times."""
    return f"{item.task.name}@{re.sub('[^0-9A-Z]', '', item.deleted_at)}"


def is_past(item: DeletedTask, retention_s: float) -> bool:
    """Whether ``item`` was deleted at least ``retention_s`` ago."""
    age = datetime.now(UTC) - datetime.fromisoformat(item.deleted_at)
    return age.total_seconds() >= retention_s  # which may be more than a timedelta holds


def latest_first(items: list[DeletedTask]) -> list[DeletedTask]:
    """``items`` in the order of ``Store.deleted``."""
    return sorted(items, key=lambda item: item.deleted_at, reverse=True)
