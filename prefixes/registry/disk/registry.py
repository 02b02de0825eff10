"""DiskRegistry: the registry in a folder, for one machine or a shared file system with working locks.

    registry.json                               format, the registry's own random id, and whether it is closed
    tenancy.json, tenancy-used.json             tenants and keys, see ``disk.tenancy``
    usage/<day>.json                            what tenants used, see ``disk.usage``
    tenants/<tenant>/blobs/<hex>.safetensors    artifacts, immutable, each tenant's own
    tenants/<tenant>/tasks/<name>.json          a task: aliases, history, versions with spec and record
    tenants/<tenant>/deleted/<name>@<time>.json  a deleted task, the same JSON, until a clean-up takes it
    tenants/<tenant>/references/<hex>/<key>     hints that this task or deleted task has an artifact; its file decides
    tenants/<tenant>/audit.jsonl                every change, see ``disk.log``
    tenants/<tenant>/last-change.json           the change that is under way or was the last, see ``disk.log``

Owns this layout and the order of writes: the artifact first, the task's file last, both atomic, under the tenant's
lock. Readers take no lock and see a task before a change or after it. Knows no server.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Final

from prefixes.errors import RegistryMissing, RegistryUnavailable, TaskNotFound, WrongRegistry
from prefixes.registry.base import AuditEntry, DeletedTask, GcReport, TaskInfo
from prefixes.registry.deleted import deleted_key, is_past, latest_first
from prefixes.registry.disk.files import Files, is_name
from prefixes.registry.disk.log import ChangeLog
from prefixes.registry.disk.tenancy import DiskTenancy
from prefixes.registry.disk.usage import DiskUsage
from prefixes.registry.disk.writer import DiskWriter
from prefixes.registry.disk.writer import blob_name as _blob
from prefixes.registry.identity import Mark, check_id, mark_from_json, mark_to_json
from prefixes.registry.quota import Kept, kept_by
from prefixes.registry.records import deleted_from_dict, task_from_dict
from prefixes.registry.store import TaskStore
from prefixes.registry.stored_json import parsed
from prefixes.spec import check_name, check_version

_RACY_S: Final = 2.0  # a file as new as this may change again without a new timestamp, so it is not cached
_BLOB: Final = re.compile(r"[0-9a-f]{64}\.safetensors")  # a clean-up leaves other files alone

_Signature = tuple[int, int, int]


class DiskRegistry(TaskStore):
    """See ``base.Store``. Safe for threads and processes; keeps no lock and no open file between calls."""

    def __init__(
        self,
        root: str | Path,
        *,
        create: bool = True,
        registry_id: str | None = None,
        restoring: bool = False,
        lock_timeout_s: float = 30.0,
    ) -> None:
        """Open the registry in ``root``; ``create`` makes one in a missing or empty folder.

        See ``open_registry`` for the rest. Raises RegistryUnavailable also where the folder holds something else.
        """
        self.restoring = restoring
        self._files = Files(Path(root), lock_timeout_s)
        self._log = ChangeLog(self._files)
        self._cache: dict[tuple[str, str], tuple[_Signature, TaskInfo]] = {}
        self._cache_lock = Lock()
        if create:
            self._create(registry_id or uuid.uuid4().hex)
        self.id = self._read().id
        check_id(self.id, registry_id)
        self.tenancy = DiskTenancy(self._files, self._checked)
        self.usage = DiskUsage(self._files, self._checked)

    def fetch(self, tenant: str, version: str) -> bytes:
        check_name("tenant", tenant)
        check_version(version)
        if self._is_indexed(tenant, version):
            try:
                return self._files.read("tenants", tenant, "blobs", _blob(version))
            except FileNotFoundError:
                if self._is_indexed(tenant, version):  # else a clean-up took it between the two looks
                    raise RegistryUnavailable(f"registry: {version} is indexed, but its artifact is missing") from None
        self.check()
        raise TaskNotFound(f"version {version}: expected one of tenant {tenant!r}, found none", version=version)

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        tenants = self.tenants() if tenant is None else [check_name("tenant", tenant)]
        return [task for name in tenants for task in self._tasks_of(name)]

    def deleted(self, tenant: str | None = None) -> list[DeletedTask]:
        tenants = self.tenants() if tenant is None else [check_name("tenant", tenant)]
        return latest_first([item for name in tenants for item in self._deleted_seen(name)])

    def audit(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        entries = self._log.entries(check_name("tenant", tenant), limit)
        self.check()
        return entries

    def replace_audit(self, tenant: str, entries: Sequence[AuditEntry]) -> None:
        with self._writing(tenant):
            self._log.replace(tenant, entries)

    def check(self) -> None:
        self._checked()

    def _checked(self) -> Mark:
        mark = self._read()
        if mark.id != self.id:
            raise WrongRegistry("registry: the folder holds another registry than the one that was opened")
        return mark

    def lost_tenants(self) -> list[str]:
        return []  # a folder is lost as a whole

    def kept_tenants(self) -> frozenset[str]:
        return frozenset()

    def begin_restoring(self) -> None:
        self._become(restoring=True)

    def finish_restoring(self, forget: Sequence[str] = ()) -> None:
        self._become(restoring=False)
        self.restoring = False

    def preflight(self) -> list[str]:
        if os.access(self._files.root, os.W_OK | os.X_OK):
            return []
        return ["the registry's folder cannot be written to: tasks are served, but none can be published or changed"]

    def subscribe(self, on_change: Callable[[str, str], None]) -> None:
        """None: a folder is polled. Machines that share it do not notify each other."""

    def close(self) -> None:
        with self._cache_lock:
            self._cache.clear()

    # --- reading ---

    def tenants(self) -> list[str]:
        found = [name for name in self._files.names("tenants") if is_name(name)]
        self.check()  # after reading, here and below: a folder that went away looks empty
        return found

    def _tasks_of(self, tenant: str) -> list[TaskInfo]:
        names = [file.removesuffix(".json") for file in self._files.names("tenants", tenant, "tasks")]
        found = [self._find(tenant, name) for name in sorted(names) if is_name(name)]
        self.check()
        return [task for task in found if task is not None]

    def _deleted_of(self, tenant: str) -> list[DeletedTask]:
        keys = [file.removesuffix(".json") for file in self._files.names("tenants", tenant, "deleted")]
        found = [self._find_deleted(tenant, key) for key in keys if is_name(key.partition("@")[0])]
        return [item for item in found if item is not None]

    def _deleted_seen(self, tenant: str) -> list[DeletedTask]:
        """Deleted tasks without a killed writer's leftovers. They are listed first: a change meanwhile hides none."""
        found = self._deleted_of(tenant)
        leftovers = self._log.leftovers(tenant) if found else frozenset()
        self.check()
        return [item for item in found if ("tenants", tenant, "deleted", f"{deleted_key(item)}.json") not in leftovers]

    def _is_indexed(self, tenant: str, version: str) -> bool:
        """Whether a task or a deleted task has ``version``: by its references, or else by reading every task.

        Every task is read only for a stored artifact without a reference that holds. Its task may be of an old release,
        may be deleted or restored just now (hence tasks are read twice), or there is none. A digest that is not stored
        here costs next to nothing.
        """
        named = self._files.names("tenants", tenant, "references", version.removeprefix("sha256:"))
        if any(_names(self._named(tenant, key), version) for key in named if is_name(key.partition("@")[0])):
            return True
        if not self._files.size("tenants", tenant, "blobs", _blob(version)):
            return False
        looks = (self._tasks_of, lambda tenant: [item.task for item in self._deleted_of(tenant)], self._tasks_of)
        return any(_names(task, version) for look in looks for task in look(tenant))

    def _named(self, tenant: str, key: str) -> TaskInfo | None:
        """The task, or the deleted task, that a reference names."""
        if "@" not in key:
            return self._find(tenant, key)
        item = self._find_deleted(tenant, key)
        return item.task if item else None

    def _task_count(self, tenant: str) -> int:
        return len(self._files.names("tenants", tenant, "tasks"))

    def _kept(self, tenant: str) -> Kept:
        noted = self._log.kept(tenant)
        return kept_by(self._tasks_of(tenant), self._deleted_seen(tenant)) if noted is None else noted

    def _find(self, tenant: str, name: str) -> TaskInfo | None:
        parts = ("tenants", tenant, "tasks", f"{name}.json")
        try:
            with self._files.opened(*parts) as file:
                status = os.fstat(file.fileno())
                signature = (status.st_ino, status.st_mtime_ns, status.st_size)
                with self._cache_lock:
                    cached = self._cache.get((tenant, name))
                if cached and cached[0] == signature:
                    return cached[1]
                data = file.read()
        except FileNotFoundError:
            with self._cache_lock:
                self._cache.pop((tenant, name), None)
            self.check()  # a folder that was emptied or unmounted has not deleted its tasks
            return None
        task = parsed(data, task_from_dict, "/".join(parts))
        if (task.tenant, task.name) != (tenant, name):
            raise RegistryUnavailable(f"registry: {'/'.join(parts)}: expected the task {tenant}/{name}")
        if time.time() - status.st_mtime > _RACY_S:
            with self._cache_lock:
                self._cache[tenant, name] = (signature, task)
        return task

    def _find_deleted(self, tenant: str, key: str) -> DeletedTask | None:
        parts = ("tenants", tenant, "deleted", f"{key}.json")
        try:
            item = parsed(self._files.read(*parts), deleted_from_dict, "/".join(parts))
        except FileNotFoundError:
            return None
        if item.task.tenant != tenant or deleted_key(item) != key:
            raise RegistryUnavailable(f"registry: {'/'.join(parts)}: expected a task of {tenant} that was deleted then")
        return item

    def _read(self) -> Mark:
        try:
            return mark_from_json(self._files.read("registry.json"), restoring=self.restoring)
        except FileNotFoundError:
            self._check_empty(self._files.names())
            raise RegistryMissing("registry: expected a registry.json in the folder, found none") from None

    # --- writing ---

    def _create(self, registry_id: str) -> None:
        found = self._files.names()
        if "registry.json" in found:
            return
        self._check_empty(found)
        with self._files.lock():
            if "registry.json" not in self._files.names():
                self._files.write(mark_to_json(Mark(registry_id, self.restoring)), "registry.json")

    def _become(self, *, restoring: bool) -> None:
        with self._files.lock():
            self._files.write(mark_to_json(replace(self._checked(), restoring=restoring)), "registry.json")

    def _check_empty(self, found: list[str]) -> None:
        """Raise WrongRegistry where a folder without a registry holds anything, even a registry's remains."""
        if found:
            raise WrongRegistry(f"registry: expected an empty folder or a registry, found {', '.join(found[:4])}")

    @contextmanager
    def _writing(self, tenant: str) -> Iterator[DiskWriter]:
        """The tenant's only writer. It first clears what killed writers left half-done."""
        check_name("tenant", tenant)
        self.check()
        with self._files.lock("tenants", tenant):
            for folder in ("blobs", "tasks", "deleted", ""):
                self._files.sweep("tenants", tenant, *([folder] if folder else []))
            self._log.finish(tenant)
            yield DiskWriter(self._files, self._log, tenant, self._find, self._kept)

    def _gc_of(self, tenant: str, retention_s: float, dry_run: bool, actor: str) -> GcReport:
        with self._writing(tenant) as writer:
            past = [item for item in self._deleted_of(tenant) if is_past(item, retention_s)]
            kept = [*self._tasks_of(tenant), *(item.task for item in self._deleted_of(tenant) if item not in past)]
            named = {_blob(info.version) for task in kept for info in task.versions}
            stored = [name for name in self._files.names("tenants", tenant, "blobs") if _BLOB.fullmatch(name)]
            taken = [name for name in stored if name not in named]
            freed = sum(self._files.size("tenants", tenant, "blobs", name) for name in taken)
            if not dry_run:
                for item in past:
                    writer.purge(item, actor)
                for name in taken:
                    self._files.remove("tenants", tenant, "blobs", name)
                    self._files.remove_folder("tenants", tenant, "references", name.removesuffix(".safetensors"))
        artifacts = tuple(f"{tenant}/sha256:{name.removesuffix('.safetensors')}" for name in taken)
        return GcReport(tuple(f"{tenant}/{item.task.name}" for item in past), artifacts, freed)


def _names(task: TaskInfo | None, version: str) -> bool:
    return task is not None and any(info.version == version for info in task.versions)
