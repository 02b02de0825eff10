"""The JSON forms of a task, a deleted one and an audit entry, the same in a store and over HTTP.

Owns the form and its validation; knows neither files nor sockets. Raises ValueError, or InvalidArtifact for a spec
inside; a store and a client make their own errors of these.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from prefixes.registry.base import (
    AuditEntry,
    DeletedTask,
    HistoryEntry,
    IdempotencyKey,
    ReplacedEntry,
    TaskInfo,
    VersionInfo,
)
from prefixes.registry.history import effective_versions
from prefixes.registry.transitions import ACTIONS
from prefixes.spec import DEFAULT_ALIAS, check_name, check_version
from prefixes.spec_json import spec_from_dict, spec_to_dict


def task_to_dict(task: TaskInfo) -> dict[str, Any]:
    """``task`` as plain JSON values: task, aliases, history per alias, versions newest first, idempotency keys."""
    return {
        "task": f"{task.tenant}/{task.name}",
        "aliases": dict(task.aliases),
        "history": {
            alias: [{"version": entry.version, "at": entry.at, "action": entry.action} for entry in entries]
            for alias, entries in task.history.items()
        },
        "versions": [version_to_dict(version) for version in task.versions],
        "once": [asdict(key) for key in task.idempotency_keys],  # the stored name
    }


def task_summary(task: TaskInfo) -> dict[str, Any]:
    """``task`` as a line of a list: aliases, production's version and its prefix length, or else the newest one's."""
    production = task.aliases.get(DEFAULT_ALIAS)
    shown = next((info for info in task.versions if info.version == production), next(iter(task.versions), None))
    return {
        "task": f"{task.tenant}/{task.name}",
        "aliases": dict(task.aliases),
        "version": production,
        "versions": len(task.versions),
        "prefix_tokens": sum(site.length for site in shown.spec.sites.values()) if shown else None,
    }


def version_to_dict(version: VersionInfo) -> dict[str, Any]:
    """One version as plain JSON values; ``replaced`` only where there is any, as in those of old releases."""
    replaced = [{"entry": entry.name, "value": entry.value, "at": entry.at} for entry in version.replaced]
    return {
        "version": version.version,
        "size": version.size,
        "published_at": version.published_at,
        "spec": spec_to_dict(version.spec),
        "record": dict(version.record),
        **({"replaced": replaced} if replaced else {}),
    }


def task_from_dict(raw: Any) -> TaskInfo:
    """The task that ``raw``, parsed JSON, describes. Raises ValueError where its parts disagree."""
    try:
        tenant, name = str(raw["task"]).split("/")
        versions = tuple(_version(item) for item in raw["versions"])
        history = {
            check_name("alias", alias): tuple(_entry(item) for item in items) for alias, items in raw["history"].items()
        }
        keys = tuple(_key(item) for item in raw.get("once", ()))  # absent in tasks of old releases
        check_name("tenant", tenant)
        task = TaskInfo(tenant, check_name("task", name), dict(raw["aliases"]), history, versions, keys)
        known = {version.version for version in versions}
        current = {alias: effective_versions(entries)[-1] for alias, entries in history.items()}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"a task's JSON: {type(error).__name__} {error}") from None
    if current != task.aliases or not known.issuperset(current.values()):
        raise ValueError("a task's JSON: expected aliases that end their history within its versions")
    if not known.issuperset(item.version for item in keys):
        raise ValueError("a task's JSON: expected publish keys of its versions")
    return task


def deleted_to_dict(item: DeletedTask) -> dict[str, Any]:
    """A deleted task as plain JSON values: the task's own, and the time."""
    return {"deleted_at": item.deleted_at, **task_to_dict(item.task)}


def deleted_from_dict(raw: Any) -> DeletedTask:
    """The deleted task that ``raw`` describes."""
    task = task_from_dict(raw)
    at = raw.get("deleted_at")
    if not isinstance(at, str):
        raise ValueError(f"a deleted task's JSON: expected its time, got {at!r}"[:300])
    if datetime.fromisoformat(at).tzinfo is None:
        raise ValueError(f"a deleted task's JSON: expected a time with its zone, got {at}"[:300])
    return DeletedTask(at, task)


def audit_to_dict(entry: AuditEntry) -> dict[str, str | None]:
    """An audit entry as plain JSON values; ``note`` only where there is one, as in those of old releases."""
    values: dict[str, str | None] = asdict(entry)
    if entry.note is None:
        del values["note"]
    return values


def audit_from_dict(raw: Any) -> AuditEntry:
    """The audit entry that ``raw`` describes; unknown keys are ignored."""
    try:
        values = {field.name: raw[field.name] for field in fields(AuditEntry) if field.name != "note"}
        values["note"] = raw.get("note")
    except (KeyError, TypeError) as error:
        raise ValueError(f"an audit entry's JSON: {type(error).__name__} {error}") from None
    if not all(isinstance(value, str | None) for value in values.values()):
        raise ValueError("an audit entry's JSON: expected texts")
    return AuditEntry(**values)


def _version(raw: Any) -> VersionInfo:
    size, record = raw["size"], raw["record"]
    if isinstance(size, bool) or not isinstance(size, int) or not isinstance(record, dict):
        raise ValueError("a version's JSON: expected an integer as its size and an object as its record")
    return VersionInfo(
        check_version(raw["version"]), size, str(raw["published_at"]), spec_from_dict(raw["spec"]), dict(record),
        tuple(_replaced(item) for item in raw.get("replaced", ())),
    )  # fmt: skip


def _replaced(raw: Any) -> ReplacedEntry:
    return ReplacedEntry(str(raw["entry"]), raw["value"], str(raw["at"]))


def _key(raw: Any) -> IdempotencyKey:
    return IdempotencyKey(check_name("publish key", raw["key"]), check_version(raw["version"]))


def _entry(raw: Any) -> HistoryEntry:
    if raw["action"] not in ACTIONS:
        raise ValueError(f"a history entry: expected {' or '.join(ACTIONS)}")
    return HistoryEntry(check_version(raw["version"]), str(raw["at"]), raw["action"])
