"""DiskRegistry: the registry in a folder, for one machine or a shared file system with working locks.

    registry.json                              format and the registry's own random id
    tenants/<tenant>/blobs/<hex>.safetensors   artifacts, immutable, each tenant's own
    tenants/<tenant>/tasks/<name>.json         a task's index: aliases, history, versions with spec and record

Owns this layout and the order of writes: the blob first, the index last, both atomic, under the tenant's lock. Readers
take no lock and see the index before a change or after it. Knows no server.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, Final

from prefixes.errors import InvalidName, PrefixdError, RegistryUnavailable, TaskNotFound
from prefixes.registry.base import Resolved, TaskInfo, VersionInfo
from prefixes.registry.files import Files
from prefixes.registry.moves import no_task, now, promoted, published, resolved, rolled_back
from prefixes.registry.records import task_from_dict, task_to_dict
from prefixes.spec import DEFAULT_ALIAS, TaskRef, check_name, check_version
from prefixes.spec_json import canonical_json, check_json

FORMAT: Final = 1
_RACY_S: Final = 2.0  # a file changed this recently may change again within its timestamp's resolution: not cached

_Signature = tuple[int, int, int]


class DiskRegistry:
    """See ``base.Registry``. Safe for threads and processes; holds no lock and no open file between calls."""

    def __init__(self, root: str | Path, *, create: bool = True, lock_timeout_s: float = 30.0) -> None:
        """Open the registry in ``root``, making one in a missing or empty folder if ``create``.

        Raises RegistryUnavailable where there is none, or where the folder holds something else.
        """
        self._files = Files(Path(root), lock_timeout_s)
        self._cache: dict[Path, tuple[_Signature, TaskInfo]] = {}
        self._cache_lock = Lock()
        if create:
            self._create()
        self.id = self._read_id()

    def resolve(self, ref: TaskRef) -> Resolved:
        return resolved(self.inspect(ref.tenant, ref.name), ref)

    def fetch(self, tenant: str, version: str) -> bytes:
        check_name("tenant", tenant)
        check_version(version)
        if self._is_indexed(tenant, version):
            try:
                return self._files.read("tenants", tenant, "blobs", _blob(version))
            except FileNotFoundError:
                if self._is_indexed(tenant, version):  # else it was deleted between the two looks
                    raise RegistryUnavailable(f"registry: {version} is indexed, but its artifact is missing") from None
        raise TaskNotFound(f"version {version}: expected one of tenant {tenant!r}, found none", version=version)

    def publish(
        self, tenant: str, name: str, data: bytes, *, alias: str | None = DEFAULT_ALIAS, record: Mapping[str, Any]
    ) -> VersionInfo:
        """As in the Protocol. Content that is known keeps its time; keys of ``record`` are added to those it has."""
        from prefixes.artifact import read_prefix, version_of, write_prefix  # brings torch: seconds that readers spare

        _check_names(tenant, name, alias)
        check_json("record", record)
        prefix = read_prefix(data)
        version, canonical = version_of(prefix), write_prefix(prefix)
        info = VersionInfo(version, len(canonical), now(), prefix.spec, dict(record))
        with self._writing(tenant):
            before = self._find(tenant, name)
            task, info = published(before or TaskInfo(tenant, name, {}, {}, ()), info, alias)
            self._write_blob(tenant, version, canonical)
            if task != before:
                self._write(task)
        return info

    def promote(
        self, tenant: str, name: str, version: str, *, alias: str = DEFAULT_ALIAS, expected_current: str | None = None
    ) -> TaskInfo:
        _check_names(tenant, name, alias)
        check_version(version)
        with self._writing(tenant):
            return self._write(promoted(self.inspect(tenant, name), version, alias, expected_current))

    def rollback(self, tenant: str, name: str, *, alias: str = DEFAULT_ALIAS) -> TaskInfo:
        _check_names(tenant, name, alias)
        with self._writing(tenant):
            return self._write(rolled_back(self.inspect(tenant, name), alias))

    def delete(self, tenant: str, name: str) -> None:
        """As in the Protocol; artifacts that no other task of the tenant has go with it."""
        with self._writing(tenant):
            self.inspect(tenant, name)
            self._files.remove("tenants", tenant, "tasks", f"{name}.json")
            with suppress(RegistryUnavailable):  # the task is gone; what stays behind, the next delete collects
                self._collect(tenant)

    def inspect(self, tenant: str, name: str) -> TaskInfo:
        _check_names(tenant, name, None)
        task = self._find(tenant, name)
        if task is None:
            raise no_task(tenant, name)
        return task

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        if tenant is not None:
            return self._tasks_of(check_name("tenant", tenant))
        return [task for name in self._files.names("tenants") if _is_name(name) for task in self._tasks_of(name)]

    def check(self) -> None:
        if self._read_id() != self.id:
            raise RegistryUnavailable("registry: the folder holds another registry than the one that was opened")
        self._files.names("tenants")

    def close(self) -> None:
        with self._cache_lock:
            self._cache.clear()

    # Below: reading

    def _tasks_of(self, tenant: str) -> list[TaskInfo]:
        names = [file.removesuffix(".json") for file in self._files.names("tenants", tenant, "tasks")]
        found = [self._find(tenant, name) for name in sorted(names) if _is_name(name)]
        return [task for task in found if task is not None]

    def _is_indexed(self, tenant: str, version: str) -> bool:
        return any(info.version == version for task in self._tasks_of(tenant) for info in task.versions)

    def _find(self, tenant: str, name: str) -> TaskInfo | None:
        parts = ("tenants", tenant, "tasks", f"{name}.json")
        try:
            with self._files.guarded("read", *parts) as path, path.open("rb") as file:
                status = os.fstat(file.fileno())
                signature = (status.st_ino, status.st_mtime_ns, status.st_size)
                with self._cache_lock:
                    cached = self._cache.get(path)
                if cached and cached[0] == signature:
                    return cached[1]
                data = file.read()
        except FileNotFoundError:
            with self._cache_lock:
                self._cache.pop(self._files.root.joinpath(*parts), None)
            return None
        try:
            raw = json.loads(data)
            task = task_from_dict(raw)
            if raw["format"] != FORMAT or (task.tenant, task.name) != (tenant, name):
                raise ValueError(f"expected format {FORMAT} and the task {tenant}/{name}")
        except (ValueError, KeyError, RecursionError, PrefixdError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise RegistryUnavailable(f"registry: {'/'.join(parts)} is no task index: {reason}") from None
        if time.time() - status.st_mtime > _RACY_S:
            with self._cache_lock:
                self._cache[path] = (signature, task)
        return task

    def _read_id(self) -> str:
        try:
            raw = json.loads(self._files.read("registry.json"))
            if raw["format"] != FORMAT:
                raise RegistryUnavailable(f"registry: expected format {FORMAT}, got {str(raw['format'])[:40]}")
            return str(raw["id"])
        except FileNotFoundError:
            raise RegistryUnavailable("registry: expected a registry.json in the folder, found none") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryUnavailable(f"registry: registry.json: {type(error).__name__}: {str(error)[:200]}") from None

    # Below: writing

    def _create(self) -> None:
        found = self._files.names()
        if "registry.json" in found:
            return
        if found:
            raise RegistryUnavailable(f"registry: expected an empty folder or a registry, found {', '.join(found[:4])}")
        with self._files.lock():
            if "registry.json" not in self._files.names():
                raw = {"format": FORMAT, "id": uuid.uuid4().hex}
                self._files.write(canonical_json(raw).encode(), "registry.json")

    @contextmanager
    def _writing(self, tenant: str) -> Iterator[None]:
        """The tenant's only writer, with what killed writers left half-done out of the way."""
        with self._files.lock("tenants", check_name("tenant", tenant)):
            self._files.sweep("tenants", tenant, "blobs")
            self._files.sweep("tenants", tenant, "tasks")
            yield

    def _collect(self, tenant: str) -> None:
        """Remove artifacts that no task names, those of killed publishers too. Call it as the tenant's only writer."""
        kept = {_blob(info.version) for task in self._tasks_of(tenant) for info in task.versions}
        for blob in self._files.names("tenants", tenant, "blobs"):
            if blob not in kept:
                self._files.remove("tenants", tenant, "blobs", blob)

    def _write_blob(self, tenant: str, version: str, data: bytes) -> None:
        parts = ("tenants", tenant, "blobs", _blob(version))
        with suppress(FileNotFoundError):
            if self._files.read(*parts) == data:
                return
        self._files.write(data, *parts)  # a damaged one is mended by publishing its content again

    def _write(self, task: TaskInfo) -> TaskInfo:
        data = json.dumps({"format": FORMAT, **task_to_dict(task)}, indent=1, sort_keys=True).encode()
        self._files.write(data, "tenants", task.tenant, "tasks", f"{task.name}.json")
        return task


def _blob(version: str) -> str:
    return f"{version.removeprefix('sha256:')}.safetensors"


def _check_names(tenant: str, name: str, alias: str | None) -> None:
    check_name("tenant", tenant)
    check_name("task", name)
    if alias is not None:
        check_name("alias", alias)


def _is_name(name: str) -> bool:
    try:
        return bool(check_name("file", name))
    except InvalidName:
        return False
