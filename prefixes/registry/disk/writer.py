"""DiskWriter: one writer at work on a tenant's folder, under its lock.

Owns the order in which the files of a change are written: references and the deleted task first, then the task's own
file, then removals. A writer that is killed at any moment leaves tasks and audit in agreement. For the layout see
``disk.registry``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from prefixes.registry.base import DeletedTask, TaskInfo
from prefixes.registry.changes import Change, Edit
from prefixes.registry.deleted import deleted_key, deleted_now
from prefixes.registry.disk.files import Files
from prefixes.registry.disk.log import ChangeLog, digest_of
from prefixes.registry.limits import check_task_bytes
from prefixes.registry.quota import Kept, added_by, check_quota
from prefixes.registry.records import deleted_to_dict, task_to_dict
from prefixes.registry.stored_json import encoded
from prefixes.registry.transitions import audit_entry


class DiskWriter:
    """See ``changes.Writer``."""

    def __init__(
        self,
        files: Files,
        log: ChangeLog,
        tenant: str,
        find: Callable[[str, str], TaskInfo | None],
        kept: Callable[[str], Kept],
    ) -> None:
        self._files, self._log, self._tenant, self._find, self._kept = files, log, tenant, find, kept

    def put(self, version: str, data: bytes) -> None:
        parts = ("tenants", self._tenant, "blobs", blob_name(version))
        with suppress(FileNotFoundError):
            if self._files.read(*parts) == data:
                return
        self._files.write(data, *parts)  # another publish of its content repairs a damaged one

    def edit(self, name: str, edit: Edit) -> TaskInfo | None:
        before = self._find(self._tenant, name)
        change = edit.plan(before)
        after = change.after
        if after == before:
            return after
        added = added_by(before, change)
        kept = self._log.kept(self._tenant) if edit.quota is None else self._kept(self._tenant)
        if edit.quota is not None and kept is not None:
            check_quota(self._tenant, edit.quota, kept, added)
        deleted = deleted_now(change.adds_deleted) if change.adds_deleted else None
        entry = audit_entry(
            edit.action, edit.actor, self._tenant, name, edit.alias, before, after, version=edit.version, note=edit.note
        )
        named = self._references(name, after)
        removed = [parts for parts in self._references(name, before) if parts not in named]
        data = encoded(task_to_dict(after)) if after else None
        if data is not None and change.adds:
            check_task_bytes(f"{self._tenant}/{name}", len(data))
        restored = self._of_deleted(change.removes_deleted) if change.removes_deleted else []
        new = self._of_deleted(deleted) if deleted else []
        for parts in [*named, *new[1:]]:
            self._files.touch(*parts)
        self._log.begin(
            self._tenant, entry, name, digest_of(data) if data is not None else None,
            remove_if_made=[*removed, *restored], remove_if_not=new, kept=(kept, kept + added) if kept else None,
        )  # fmt: skip
        if deleted:
            self._files.write(encoded(deleted_to_dict(deleted)), *new[0])
        if data is not None:
            self._files.write(data, *self._path("tasks", f"{name}.json"))
        else:
            self._files.remove(*self._path("tasks", f"{name}.json"))
        self._log.finish(self._tenant)
        return after

    def purge(self, item: DeletedTask, actor: str) -> None:
        """Remove a deleted task for good. The clean-up takes its artifacts."""
        name = item.task.name
        entry = audit_entry("purge", actor, self._tenant, name, None, item.task, None)
        unchanged = self._log.digest(self._tenant, name)  # so the change counts as made as soon as it is begun
        kept = self._log.kept(self._tenant)
        less = (kept, kept + added_by(None, Change(None, removes_deleted=item))) if kept else None
        self._log.begin(self._tenant, entry, name, unchanged, remove_if_made=self._of_deleted(item), kept=less)
        self._log.finish(self._tenant)

    def _of_deleted(self, item: DeletedTask) -> list[tuple[str, ...]]:
        """The files of a deleted task: its own, then its references."""
        key = deleted_key(item)
        return [self._path("deleted", f"{key}.json"), *self._references(key, item.task)]

    def _references(self, key: str, task: TaskInfo | None) -> list[tuple[str, ...]]:
        versions = task.versions if task else ()
        return [self._path("references", info.version.removeprefix("sha256:"), key) for info in versions]

    def _path(self, *parts: str) -> tuple[str, ...]:
        return ("tenants", self._tenant, *parts)


def blob_name(version: str) -> str:
    """The file name of an artifact."""
    return f"{version.removeprefix('sha256:')}.safetensors"
