"""What the registry's calls do to a task: pure functions from TaskInfo to TaskInfo, the same for every store.

Owns the rules of aliases and their history; knows no store. A history only grows. Replayed, a publish or a promote
puts a version on a stack, a rollback takes one off: rolling back twice goes two versions back, never to and fro, and a
version rolled back from is not returned to unless it is promoted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from prefixes.errors import Conflict, TaskNotFound
from prefixes.registry.base import (
    KEYS_KEPT,
    AuditEntry,
    HistoryEntry,
    PublishKey,
    Resolved,
    TaskInfo,
    VersionInfo,
)
from prefixes.spec import DEFAULT_ALIAS, TaskRef

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


def published(task: TaskInfo, info: VersionInfo, alias: str | None, once: str | None = None) -> TaskInfo:
    """``task`` with one more version, ``alias`` pointing at it (None moves none); unchanged where it knows ``once``.

    Content that is known keeps its time; keys of the new record are added to those it has.
    """
    if published_once(task, once):
        return task
    known = next((old for old in task.versions if old.version == info.version), None)
    if known:
        info = replace(known, record={**known.record, **info.record})
        versions = tuple(info if old.version == info.version else old for old in task.versions)
    else:
        versions = (info, *task.versions)
    task = replace(task, versions=versions)
    if once is not None:
        task = replace(task, once=(*task.once, PublishKey(once, info.version))[-KEYS_KEPT:])
    return _pointed(task, alias, info.version, "publish") if alias else task


def published_once(task: TaskInfo, once: str | None) -> VersionInfo | None:
    """What was published with the key ``once``, None where the task does not know it."""
    version = next((known.version for known in task.once if known.key == once), None)
    return version_of_task(task, version) if version else None


def check_not_buried(once: str, buried: Iterable[TaskInfo]) -> None:
    """Raise Conflict where a deleted task knows ``once``: being repeated does not bring back what was deleted."""
    for task in buried:
        if published_once(task, once):
            raise Conflict(
                f"publish to {task.tenant}/{task.name}: expected a publish key that is new, got {once}, which was "
                "published to a task of that name that was deleted or replaced since",
                once=once,
            )


def promoted(task: TaskInfo, version: str, alias: str, expected_current: str | None) -> TaskInfo:
    """``task`` with ``alias`` at ``version``. Raises TaskNotFound for an unknown version, else as in the Protocol."""
    current = task.aliases.get(alias)
    if expected_current is not None and current != expected_current:
        raise Conflict(
            f"promote of {task.tenant}/{task.name}@{alias}: expected it at {expected_current}, "
            f"got {current or 'no such alias'}",
            expected=expected_current,
            got=current,
        )
    version_of_task(task, version)
    return _pointed(task, alias, version, "promote")


def rolled_back(task: TaskInfo, alias: str) -> TaskInfo:
    """``task`` with ``alias`` one version back. Raises TaskNotFound, or Conflict where no earlier version is left."""
    history = task.history.get(alias)
    if history is None:
        raise _no_alias(task, alias)
    stack = effective_versions(history)
    if len(stack) < 2:
        raise Conflict(
            f"rollback of {task.tenant}/{task.name}@{alias}: expected an earlier version, got none before {stack[-1]}",
            current=stack[-1],
        )
    return _moved(task, alias, HistoryEntry(stack[-2], now(), "rollback"))


def audited(
    action: str,
    actor: str,
    tenant: str,
    name: str,
    alias: str | None,
    before: TaskInfo | None,
    after: TaskInfo | None,
    *,
    published: str | None = None,
) -> AuditEntry:
    """The entry for a change from ``before`` to ``after``; None is no task.

    ``published`` is the version that a publish brought: what the entry tells of one that moved no alias.
    """
    old, new = (task.aliases.get(alias or DEFAULT_ALIAS) if task else None for task in (before, after))
    if published is not None and alias is None:
        old, new = None, published
    return AuditEntry(now(), actor, action, f"{tenant}/{name}", alias, old, new)


def resolved(task: TaskInfo, ref: TaskRef) -> Resolved:
    """What ``ref``, a reference to ``task``, means now. Raises TaskNotFound for an unknown alias or version."""
    version = ref.version
    if version is None:
        alias = ref.alias or ""
        version = task.aliases.get(alias)
        if version is None:
            raise _no_alias(task, alias)
    info = version_of_task(task, version)
    return Resolved(task.tenant, task.name, info.version, info.spec)


def version_of_task(task: TaskInfo, version: str) -> VersionInfo:
    """The entry of ``version``. Raises TaskNotFound."""
    for info in task.versions:
        if info.version == version:
            return info
    raise TaskNotFound(
        f"task {task.tenant}/{task.name}: version {version}: expected one of its {len(task.versions)}, found none",
        task=f"{task.tenant}/{task.name}",
        version=version,
    )


def no_task(tenant: str, name: str) -> TaskNotFound:
    """The error for a task that the tenant does not have."""
    return TaskNotFound(f"task {tenant}/{name}: expected a published task, found none", task=f"{tenant}/{name}")


def _no_alias(task: TaskInfo, alias: str) -> TaskNotFound:
    return TaskNotFound(
        f"task {task.tenant}/{task.name}: alias {alias!r}: expected one of {', '.join(task.aliases) or 'no aliases'}",
        task=f"{task.tenant}/{task.name}",
        alias=alias,
    )


def _pointed(task: TaskInfo, alias: str, version: str, action: str) -> TaskInfo:
    if task.aliases.get(alias) == version:
        return task
    return _moved(task, alias, HistoryEntry(version, now(), action))


def _moved(task: TaskInfo, alias: str, entry: HistoryEntry) -> TaskInfo:
    return replace(
        task,
        aliases={**task.aliases, alias: entry.version},
        history={**task.history, alias: (*task.history.get(alias, ()), entry)},
    )
