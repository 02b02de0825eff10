"""What each call of the registry does to a task: pure functions from TaskInfo to TaskInfo, the same for every store.

Owns the rules of versions, aliases and publish keys; ``history`` has those of an alias's past. Knows no store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from prefixes.errors import Conflict, TaskNotFound
from prefixes.registry.base import (
    NOWHERE,
    AuditEntry,
    HistoryEntry,
    IdempotencyKey,
    ReplacedEntry,
    Resolved,
    TaskInfo,
    VersionInfo,
)
from prefixes.registry.history import rollback_entries, trimmed
from prefixes.registry.limits import (
    KEYS_KEPT,
    REPLACED_BYTES,
    REPLACED_KEPT,
    check_aliases,
    check_record,
    check_versions,
)
from prefixes.spec import DEFAULT_ALIAS, TaskRef

ACTIONS: Final = ("publish", "promote", "rollback")


def now() -> str:
    """The time as the registry writes it: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def published(
    task: TaskInfo,
    info: VersionInfo,
    alias: str | None,
    idempotency_key: str | None = None,
    expected_current: str | None = None,
) -> TaskInfo:
    """``task`` with one more version and ``alias`` at it (None moves none); unchanged where the task knows the key.

    Known content keeps its time; the new record's entries are added as VersionInfo says. Raises LimitReached, and
    Conflict as in the Protocol.
    """
    if published_with(task, idempotency_key):
        return task
    if alias is not None:
        _check_current("publish", task, alias, expected_current)
    known = next((old for old in task.versions if old.version == info.version), None)
    if known:
        info = _with_record(known, info.record)
    if known != info:
        check_record(f"{task.tenant}/{task.name}", info)
    if known:
        versions = tuple(info if old.version == info.version else old for old in task.versions)
    else:
        versions = (info, *task.versions)
        check_versions(f"{task.tenant}/{task.name}", len(versions))
    task = replace(task, versions=versions)
    if idempotency_key is not None:
        keys = (*task.idempotency_keys, IdempotencyKey(idempotency_key, info.version))
        task = replace(task, idempotency_keys=keys[-KEYS_KEPT:])
    return _with_alias(task, alias, info.version, "publish") if alias else task


def published_with(task: TaskInfo, idempotency_key: str | None) -> VersionInfo | None:
    """The version that was published with the key, None where the task does not know it."""
    version = next((known.version for known in task.idempotency_keys if known.key == idempotency_key), None)
    return version_of_task(task, version) if version else None


def check_key_not_deleted(idempotency_key: str, deleted: Iterable[TaskInfo]) -> None:
    """Raise Conflict where a deleted task knows the key: a repeated publish does not bring back a deleted task."""
    for task in deleted:
        if published_with(task, idempotency_key):
            raise Conflict(
                f"publish to {task.tenant}/{task.name}: expected a publish key that is new, got {idempotency_key}, "
                "which was published to a task of that name that was deleted or replaced since",
                once=idempotency_key,  # the field's name over HTTP
            )


def promoted(task: TaskInfo, version: str, alias: str, expected_current: str | None) -> TaskInfo:
    """``task`` with ``alias`` at ``version``. Raises TaskNotFound, and Conflict as in the Protocol."""
    _check_current("promote", task, alias, expected_current)
    version_of_task(task, version)
    return _with_alias(task, alias, version, "promote")


def rolled_back(task: TaskInfo, alias: str, expected_current: str | None) -> TaskInfo:
    """``task`` with ``alias`` one version back. Raises TaskNotFound, and Conflict as in the Protocol."""
    history = task.history.get(alias)
    if history is None:
        raise _no_alias(task, alias)
    _check_current("rollback", task, alias, expected_current)
    entries = rollback_entries(history, {info.version for info in task.versions}, now())
    if not entries:
        current = task.aliases[alias]
        raise Conflict(
            f"rollback of {task.tenant}/{task.name}@{alias}: expected an earlier version, got none before {current}",
            current=current,
        )
    return _with_entries(task, alias, entries)


def version_removed(task: TaskInfo, version: str) -> tuple[TaskInfo, TaskInfo]:
    """``task`` without ``version``, and what is kept of it as of a deleted task: the version with its publish keys.

    Raises TaskNotFound, and Conflict while an alias points at it.
    """
    info = version_of_task(task, version)
    pointing = sorted(alias for alias, current in task.aliases.items() if current == version)
    if pointing:
        raise Conflict(
            f"delete of {task.tenant}/{task.name}@{version}: expected no alias that points at it, "
            f"got {', '.join(pointing)}",
            aliases=pointing,
        )
    keys = [key for key in task.idempotency_keys if key.version == version]
    kept = tuple(key for key in task.idempotency_keys if key.version != version)
    versions = tuple(other for other in task.versions if other.version != version)
    return (
        replace(task, versions=versions, idempotency_keys=kept),
        TaskInfo(task.tenant, task.name, {}, {}, (info,), tuple(keys)),
    )


def prunable(task: TaskInfo, keep: int) -> list[str]:
    """The versions behind the newest ``keep`` that no alias points at, newest first."""
    pointed = set(task.aliases.values())
    return [info.version for info in task.versions[keep:] if info.version not in pointed]


def audit_entry(
    action: str,
    actor: str,
    tenant: str,
    name: str,
    alias: str | None,
    before: TaskInfo | None,
    after: TaskInfo | None,
    *,
    version: str | None = None,
    note: str | None = None,
) -> AuditEntry:
    """The audit entry of a change from ``before`` to ``after``; None is no task.

    ``version`` is that of a publish or of a delete of one version: the entry names it where no alias moved.
    """
    old, new = (task.aliases.get(alias or DEFAULT_ALIAS) if task else None for task in (before, after))
    if version is not None and alias is None:
        old, new = (None, version) if action == "publish" else (version, None)
    return AuditEntry(now(), actor, action, f"{tenant}/{name}", alias, old, new, note)


def resolved(task: TaskInfo, ref: TaskRef) -> Resolved:
    """The version of ``task`` that ``ref`` names now. Raises TaskNotFound for an unknown alias or version."""
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
        f"task {task.tenant}/{task.name}: version {version}: expected one of its versions, found none",
        task=f"{task.tenant}/{task.name}",
        version=version,
    )


def no_task(tenant: str, name: str) -> TaskNotFound:
    """The error for a task that the tenant does not have."""
    return TaskNotFound(f"task {tenant}/{name}: expected a published task, found none", task=f"{tenant}/{name}")


def _check_current(action: str, task: TaskInfo, alias: str, expected: str | None) -> None:
    current = task.aliases.get(alias, NOWHERE)
    if expected is not None and current != expected:
        raise Conflict(
            f"{action} of {task.tenant}/{task.name}@{alias}: expected "
            f"{f'it at {expected}' if expected else 'no such alias'}, got {current or 'no such alias'}",
            expected=expected or None,
            got=current or None,
        )


def _with_record(known: VersionInfo, record: Mapping[str, Any]) -> VersionInfo:
    """``known`` with the entries of ``record``, and with those that these replace, while there is room for them."""
    differing = (name for name in record if name in known.record and _json(known.record[name]) != _json(record[name]))
    replaced: list[ReplacedEntry] = []
    room = REPLACED_BYTES
    for entry in (*known.replaced, *(ReplacedEntry(name, known.record[name], now()) for name in differing)):
        taken = len(_json([entry.name, entry.value]))
        if len(replaced) < REPLACED_KEPT and taken <= room:
            replaced.append(entry)
            room -= taken
    return replace(known, record={**known.record, **record}, replaced=tuple(replaced))


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _no_alias(task: TaskInfo, alias: str) -> TaskNotFound:
    return TaskNotFound(
        f"task {task.tenant}/{task.name}: alias {alias!r}: expected one of {', '.join(task.aliases) or 'no aliases'}",
        task=f"{task.tenant}/{task.name}",
        alias=alias,
    )


def _with_alias(task: TaskInfo, alias: str, version: str, action: str) -> TaskInfo:
    if task.aliases.get(alias) == version:
        return task
    if alias not in task.aliases:
        check_aliases(f"{task.tenant}/{task.name}", len(task.aliases) + 1)
    return _with_entries(task, alias, [HistoryEntry(version, now(), action)])


def _with_entries(task: TaskInfo, alias: str, entries: Sequence[HistoryEntry]) -> TaskInfo:
    return replace(
        task,
        aliases={**task.aliases, alias: entries[-1].version},
        history={**task.history, alias: trimmed((*task.history.get(alias, ()), *entries))},
    )
