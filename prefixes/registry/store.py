"""TaskStore: the part of ``base.Store`` that is the same for every store.

Owns the calls in terms of a ``Writer``: it checks names, validates content, and describes a change as a pure function
of the task before it. A store calls this function again when another writer was quicker. Knows no store.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from prefixes.errors import Conflict, InvalidArtifact, InvalidParameter, TaskNotFound
from prefixes.registry.base import (
    RETENTION_S,
    UNKNOWN_ACTOR,
    DeletedTask,
    GcReport,
    Resolved,
    TaskInfo,
    VersionInfo,
)
from prefixes.registry.changes import Change, Edit, Writer
from prefixes.registry.failed_tenants import FailedTenants
from prefixes.registry.limits import check_note, check_tasks
from prefixes.registry.quota import Kept, added_by, check_quota
from prefixes.registry.transitions import (
    check_key_not_deleted,
    no_task,
    now,
    promoted,
    published,
    published_with,
    resolved,
    rolled_back,
    version_of_task,
    version_removed,
)
from prefixes.spec import DEFAULT_ALIAS, TaskRef, check_name, check_version
from prefixes.spec_json import check_json
from prefixes.tenancy.limits import Limits

if TYPE_CHECKING:
    from prefixes.artifact import Prefix


class TaskStore(ABC):
    """See ``base.Store``."""

    @abstractmethod
    def _find(self, tenant: str, name: str) -> TaskInfo | None:
        """The task, or None."""

    @abstractmethod
    def _writing(self, tenant: str) -> AbstractContextManager[Writer]:
        """A writer for the tenant."""

    @abstractmethod
    def _task_count(self, tenant: str) -> int:
        """How many tasks the tenant has."""

    @abstractmethod
    def _kept(self, tenant: str) -> Kept:
        """What the tenant has, by a total where one is noted, else by counting."""

    @abstractmethod
    def _gc_of(self, tenant: str, retention_s: float, dry_run: bool, actor: str) -> GcReport:
        """As ``gc``, of one tenant."""

    @abstractmethod
    def tenants(self) -> list[str]:
        """As in the Protocol."""

    @abstractmethod
    def check(self) -> None:
        """As in the Protocol."""

    @abstractmethod
    def deleted(self, tenant: str | None = None) -> list[DeletedTask]:
        """As in the Protocol."""

    def resolve(self, ref: TaskRef) -> Resolved:
        return resolved(self.inspect(ref.tenant, ref.name), ref)

    def inspect(self, tenant: str, name: str) -> TaskInfo:
        check_names(tenant, name)
        return _existing(self._find(tenant, name), tenant, name)

    def publish(
        self,
        tenant: str,
        name: str,
        data: bytes,
        *,
        alias: str | None = DEFAULT_ALIAS,
        expected_current: str | None = None,
        record: Mapping[str, Any],
        actor: str = UNKNOWN_ACTOR,
        idempotency_key: str | None = None,
        note: str | None = None,
        quota: Limits | None = None,
    ) -> VersionInfo:
        check_names(tenant, name, alias)
        check_json("record", record)
        if idempotency_key is not None:
            check_name("publish key", idempotency_key)
        if note is not None:
            check_note(note)
        if alias is None and expected_current is not None:
            raise InvalidParameter(
                "expected_current: expected an alias that moves beside it, got none", parameter="expected_current"
            )
        current = self._find(tenant, name)
        if current and (done := published_with(current, idempotency_key)):
            return done
        from prefixes.artifact import read_prefix, version_of, write_prefix  # imports torch: seconds that readers save

        prefix = read_prefix(data)
        version, canonical = version_of(prefix), write_prefix(prefix)
        info = VersionInfo(version, len(canonical), now(), prefix.spec, dict(record))

        def plan(before: TaskInfo | None) -> Change:
            if idempotency_key is not None and not (before and published_with(before, idempotency_key)):
                deleted = (item.task for item in self.deleted(tenant) if item.task.name == name)
                check_key_not_deleted(idempotency_key, deleted)
            if before is None:
                check_tasks(tenant, self._task_count(tenant) + 1)
            task = before or TaskInfo(tenant, name, {}, {}, ())
            after = published(task, info, alias, idempotency_key, expected_current)
            return Change(after, adds=True)

        planned = plan(current)  # what is refused stores no artifact
        if quota is not None:
            check_quota(tenant, quota, self._kept(tenant), added_by(current, planned))
        with self._writing(tenant) as writer:
            writer.put(version, canonical)
            after = writer.edit(name, Edit("publish", actor, alias, plan, version, quota, note))
        assert after is not None
        return published_with(after, idempotency_key) or version_of_task(after, version)

    def promote(
        self,
        tenant: str,
        name: str,
        version: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expected_current: str | None = None,
        actor: str = UNKNOWN_ACTOR,
    ) -> TaskInfo:
        check_version(version)

        def plan(before: TaskInfo | None) -> Change:
            return Change(promoted(_existing(before, tenant, name), version, alias, expected_current))

        return self._edit(tenant, name, Edit("promote", actor, alias, plan))

    def rollback(
        self,
        tenant: str,
        name: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expected_current: str | None = None,
        actor: str = UNKNOWN_ACTOR,
    ) -> TaskInfo:
        def plan(before: TaskInfo | None) -> Change:
            return Change(rolled_back(_existing(before, tenant, name), alias, expected_current))

        return self._edit(tenant, name, Edit("rollback", actor, alias, plan))

    def delete(self, tenant: str, name: str, *, actor: str = UNKNOWN_ACTOR) -> None:
        check_names(tenant, name)

        def plan(before: TaskInfo | None) -> Change:
            return Change(None, adds_deleted=_existing(before, tenant, name))

        self._changed(tenant, name, Edit("delete", actor, None, plan))

    def delete_version(self, tenant: str, name: str, version: str, *, actor: str = UNKNOWN_ACTOR) -> None:
        check_names(tenant, name)
        check_version(version)

        def plan(before: TaskInfo | None) -> Change:
            after, removed = version_removed(_existing(before, tenant, name), version)
            return Change(after, adds_deleted=removed)

        self._changed(tenant, name, Edit("delete_version", actor, None, plan, version))

    def undelete(
        self, tenant: str, name: str, *, actor: str = UNKNOWN_ACTOR, quota: Limits | None = None
    ) -> TaskInfo:
        def plan(before: TaskInfo | None) -> Change:
            if before is not None:
                raise Conflict(f"undelete of {tenant}/{name}: expected no task of that name, found one")
            found = next((item for item in self.deleted(tenant) if item.task.name == name), None)
            if found is None:
                raise TaskNotFound(f"undelete of {tenant}/{name}: expected a deleted task, found none")
            check_tasks(tenant, self._task_count(tenant) + 1)
            return Change(found.task, removes_deleted=found)

        return self._edit(tenant, name, Edit("undelete", actor, None, plan, quota=quota))

    def adopt(
        self,
        task: TaskInfo,
        fetch: Callable[[str], bytes],
        *,
        replace: bool = False,
        actor: str = UNKNOWN_ACTOR,
    ) -> bool:
        """As in the Protocol. One artifact is in memory at a time."""
        check_names(task.tenant, task.name)

        def plan(before: TaskInfo | None) -> Change:
            if before is not None and before != task and not replace:
                raise Conflict(f"task {task.tenant}/{task.name}: expected none or the same one here, found another")
            return Change(task, adds_deleted=before if before != task else None)

        current = self._find(task.tenant, task.name)
        if current == task:
            return False
        plan(current)  # raises a conflict before anything is fetched
        with self._writing(task.tenant) as writer:
            for info in task.versions:
                data = fetch(info.version)
                check_artifact(data, info)
                writer.put(info.version, data)
            writer.edit(task.name, Edit("copy", actor, None, plan))
        return True

    def gc(
        self, *, retention_s: float = RETENTION_S, dry_run: bool = False, actor: str = UNKNOWN_ACTOR
    ) -> GcReport:
        """As in the Protocol."""
        reports, failed = [], FailedTenants(self)
        for tenant in self.tenants():
            with failed.skip_failed(tenant):
                reports.append(self._gc_of(tenant, retention_s, dry_run, actor))
        reasons = tuple(f"{tenant}: {why}" for tenant, why in failed.reasons.items())
        return GcReport.of_all([*reports, GcReport((), (), 0, reasons)])

    def _edit(self, tenant: str, name: str, edit: Edit) -> TaskInfo:
        check_names(tenant, name, edit.alias)
        after = self._changed(tenant, name, edit)
        assert after is not None
        return after

    def _changed(self, tenant: str, name: str, edit: Edit) -> TaskInfo | None:
        before = self._find(tenant, name)
        self.check()  # during a restore what is missing may still come
        edit.plan(before)  # what is refused makes no writer, and no place for an unknown tenant
        with self._writing(tenant) as writer:
            return writer.edit(name, edit)


def check_names(tenant: str, name: str, alias: str | None = None) -> None:
    """Raise InvalidName unless all are valid."""
    check_name("tenant", tenant)
    check_name("task", name)
    if alias is not None:
        check_name("alias", alias)


def check_artifact(data: bytes, info: VersionInfo) -> Prefix:
    """The prefix in ``data``, the artifact of ``info``. Raises InvalidArtifact where ``info`` does not describe it."""
    from prefixes.artifact import read_prefix

    prefix = read_prefix(data, expected_version=info.version)
    if prefix.spec != info.spec or len(data) != info.size:
        raise InvalidArtifact(f"{info.version}: expected what the index says of metadata and size, got something else")
    return prefix


def _existing(task: TaskInfo | None, tenant: str, name: str) -> TaskInfo:
    if task is None:
        raise no_task(tenant, name)
    return task
