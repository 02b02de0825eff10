"""RedisWriter: one writer at work on a tenant.

Owns leases and the making of a change. A change is planned on the task as it was read. One script commits it if the
task is still the same; if not, it is planned again. A change has an id: a repetition after a lost answer does not make
it twice. It also has a latest time: a change that was answered with an error is not made later, when a server that had
stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import Any, Final

from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry.base import AuditEntry, DeletedTask, TaskInfo
from prefixes.registry.changes import Change, Edit
from prefixes.registry.deleted import deleted_key, deleted_now
from prefixes.registry.limits import AUDIT_KEPT, check_task_bytes
from prefixes.registry.quota import added_by, check_quota, limits_of
from prefixes.registry.records import audit_to_dict, deleted_to_dict, task_from_dict, task_to_dict
from prefixes.registry.redis.commands import RedisCommands
from prefixes.registry.redis.kept import kept_of
from prefixes.registry.redis.keys import CHANGES, TenantKeys
from prefixes.registry.stored_json import encoded, parsed
from prefixes.registry.transitions import audit_entry
from prefixes.tenancy.limits import Limits

LEASE_S: Final = 600.0
EDIT_S: Final = 5.0
"""A change is given up when other writers were quicker for so long."""


class RedisWriter:
    """See ``changes.Writer``."""

    def __init__(self, commands: RedisCommands, tenant: str) -> None:
        self._commands, self._tenant = commands, tenant
        self._keys = TenantKeys(tenant)
        self._token = uuid.uuid4().hex
        self._leased: list[str] = []

    def put(self, version: str, data: bytes) -> None:
        commands, tenant = self._commands, self._tenant
        commands.identity.enter(tenant)
        if not commands.lease(tenant, version, self._token, LEASE_S):
            raise commands.identity.lost()
        self._leased.append(version)
        commands.write_blob(tenant, version, data)

    def edit(self, name: str, edit: Edit) -> TaskInfo | None:
        def attempt(before: TaskInfo | None) -> tuple[Change, AuditEntry]:
            change = edit.plan(before)
            return change, audit_entry(
                edit.action, edit.actor, self._tenant, name, edit.alias, before, change.after,
                version=edit.version, note=edit.note,
            )  # fmt: skip

        return self._make(name, attempt, edit.quota)

    def purge(self, item: DeletedTask, actor: str) -> bool:
        """Remove a deleted task for good; False if it is gone. The clean-up takes its artifacts."""
        entry = audit_entry("purge", actor, self._tenant, item.task.name, None, item.task, None)
        try:
            self._make(item.task.name, lambda before: (Change(before, removes_deleted=item), entry))
        except TaskNotFound:
            return False
        return True

    def close(self) -> None:
        """Give the leases back."""
        self._commands.release(self._tenant, self._leased, self._token)

    def _make(
        self,
        name: str,
        attempt: Callable[[TaskInfo | None], tuple[Change, AuditEntry]],
        quota: Limits | None = None,
    ) -> TaskInfo | None:
        change_id, give_up = uuid.uuid4().hex, time.monotonic() + EDIT_S
        while time.monotonic() < give_up:
            clock_ms, raw = self._commands.begin(self._tenant, name)
            before = parsed(raw, task_from_dict, f"{self._tenant}/{name}") if raw is not None else None
            change, entry = attempt(before)
            if change.after == before and change.removes_deleted is None:
                return before
            if quota is not None:
                check_quota(self._tenant, quota, kept_of(self._commands, self._tenant), added_by(before, change))
            outcome = self._commit(name, entry, before, raw, change, change_id, clock_ms, quota)
            if outcome == "made":
                return change.after
            if outcome == "gone" and change.after == before:  # a purge; an undelete plans again
                raise TaskNotFound(f"{entry.action} of {entry.task}: expected a deleted task, found none")
            if outcome == "foreign":
                raise self._commands.identity.lost()
            if outcome == "missing":
                raise RegistryUnavailable("registry: the artifact is gone: publishing it took longer than its lease")
            if outcome == "late":
                raise RegistryUnavailable("registry: Redis took too long; nothing was changed")
        raise RegistryUnavailable(f"registry: other writers of {self._tenant}/{name} were quicker for {EDIT_S:g} s")

    def _commit(
        self,
        name: str,
        entry: AuditEntry,
        before: TaskInfo | None,
        raw: bytes | None,
        change: Change,
        change_id: str,
        clock_ms: int,
        quota: Limits | None,
    ) -> str:
        keys, after = self._keys, change.after
        batch = _Batch([keys.done(change_id), keys.id, keys.task(name), keys.deleted, keys.audit, keys.total])
        # First: Redis may refuse a caller's text, and then nothing has changed yet.
        batch.add("XADD", keys.audit, "MAXLEN", "~", str(AUDIT_KEPT), "*", *audit_fields(entry))
        if after is None:
            batch.add("DEL", keys.task(name))
            batch.add("SREM", keys.tasks, name)
        elif after != before:
            data = encoded(task_to_dict(after))
            if change.adds:
                check_task_bytes(f"{self._tenant}/{name}", len(data))
            batch.add("SET", keys.task(name), data.decode())
            batch.add("SADD", keys.tasks, name)
        for version in _versions(before) - _versions(after):
            batch.add("SREM", keys.names(version), name)
        for version in _versions(after) - _versions(before):
            batch.add("SADD", keys.names(version), name)
        if change.adds_deleted:
            deleted = deleted_now(change.adds_deleted)
            batch.add("HSET", keys.deleted, deleted_key(deleted), encoded(deleted_to_dict(deleted)).decode())
            for version in _versions(change.adds_deleted):
                batch.add("SADD", keys.names(version), deleted_key(deleted))
        removed_key = deleted_key(change.removes_deleted) if change.removes_deleted else ""
        if change.removes_deleted:
            batch.add("HDEL", keys.deleted, removed_key)
            for version in _versions(change.removes_deleted.task):
                batch.add("SREM", keys.names(version), removed_key)
        for version in self._leased:  # a clean-up after the end of a lease may have removed it
            batch.add("SADD", keys.blobs, version)
        needed_keys = [batch.index(keys.blob(version)) for version in self._leased]
        return self._commands.commit(
            batch.keys,
            latest_ms=clock_ms + self._commands.timeout_ms,
            planned_on=hashlib.sha1(raw).hexdigest() if raw is not None else "",
            needed_deleted=removed_key,
            operations=batch.operations,
            needed_keys=needed_keys,
            channel=CHANGES,
            message=f"{self._tenant}/{name}",
            added=astuple(added_by(before, change)),
            limits=[-1 if most is None else most for most in limits_of(quota)] if quota is not None else None,
        )


class _Batch:
    """Operations for a script: each names its key by the number of the key in ``keys``."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = list(keys)
        self._numbers = {key: number for number, key in enumerate(self.keys, 1)}
        self._operations: list[list[Any]] = []

    def index(self, key: str) -> int:
        if key not in self._numbers:
            self.keys.append(key)
            self._numbers[key] = len(self.keys)
        return self._numbers[key]

    def add(self, command: str, key: str, *arguments: str) -> None:
        self._operations.append([command, self.index(key), *arguments])

    @property
    def operations(self) -> str:
        return json.dumps(self._operations)


def audit_fields(entry: AuditEntry) -> list[str]:
    """An entry of the stream: names and values by turns."""
    return [part for key, text in audit_to_dict(entry).items() if text is not None for part in (key, text)]


def _versions(task: TaskInfo | None) -> set[str]:
    return {info.version for info in task.versions} if task else set()
