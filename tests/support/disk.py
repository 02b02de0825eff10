"""A disk registry's folder for tests: makes it once, copies it, and reads it as a fresh reader does. Knows no test."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from prefixes.artifact import version_of, write_prefix
from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry.base import HistoryEntry, TaskInfo, VersionInfo
from prefixes.registry.disk.registry import DiskRegistry
from prefixes.tenancy.limits import Limits
from tests.support.prefixes import make_prefix

PREFIXES = [make_prefix(seed=seed) for seed in range(3)]
DATA = [write_prefix(prefix) for prefix in PREFIXES]
VERSIONS = [version_of(prefix) for prefix in PREFIXES]
INDEX = "tenants/default/tasks/e2e.json"
AUDIT = "tenants/default/audit.jsonl"
LAST = "tenants/default/last-change.json"


def digits(index: int) -> str:
    """The hexadecimal part of a version."""
    return VERSIONS[index].removeprefix("sha256:")


def blob(index: int, tenant: str = "default") -> str:
    """Where an artifact lies."""
    return f"tenants/{tenant}/blobs/{digits(index)}.safetensors"


def publish(registry: DiskRegistry, index: int, name: str = "e2e", tenant: str = "default") -> None:
    registry.publish(tenant, name, DATA[index], record={}, actor="ci")


def prepare(root: Path) -> DiskRegistry:
    """``e2e`` with versions 0 and 1, and ``old``, deleted, with version 2."""
    registry = DiskRegistry(root)
    publish(registry, 0)
    publish(registry, 1)
    registry.publish("default", "old", DATA[2], record={}, actor="ci", quota=Limits())  # notes how much there is
    registry.delete("default", "old", actor="ci")
    return registry


def clean(registry: DiskRegistry, actor: str = "ci") -> None:
    """A clean-up of everything deleted; of a tenant that cannot be cleaned the error."""
    for failed in registry.gc(retention_s=0, actor=actor).failed:
        raise RegistryUnavailable(failed)


def elsewhere(name: str, *indices: int, tenant: str = "default") -> TaskInfo:
    """A task as another registry has it, its last version the newest."""
    at = "2026-01-01T00:00:00.000Z"
    versions = [VersionInfo(VERSIONS[i], len(DATA[i]), at, PREFIXES[i].spec, {"from": "elsewhere"}) for i in indices]
    history = tuple(HistoryEntry(info.version, at, "publish") for info in versions)
    return TaskInfo(tenant, name, {"production": versions[-1].version}, {"production": history}, tuple(versions[::-1]))


def bring(version: str) -> bytes:
    """The artifact of a version, as another registry would give it."""
    return DATA[VERSIONS.index(version)]


@dataclass(frozen=True)
class Seen:
    """What a fresh reader sees of a registry, but for times."""

    tasks: list[Any]
    deleted: list[Any]
    audit: dict[str, list[Any]]  # per tenant, the latest first


def see(root: Path, *, reachable: set[str] | frozenset[str] = frozenset()) -> Seen:
    """Look, and prove that every listed artifact can be fetched and no other, but for ``reachable`` ones."""
    registry = DiskRegistry(root, create=False)
    tasks, deleted = registry.tasks(), registry.deleted()
    listed = {(task.tenant, info.version) for task in tasks for info in task.versions}
    listed |= {(item.task.tenant, info.version) for item in deleted for info in item.task.versions}
    for tenant in ("default", "fresh"):
        for version, data in zip(VERSIONS, DATA, strict=True):
            if (tenant, version) in listed:
                assert registry.fetch(tenant, version) == data
            elif version not in reachable:
                with pytest.raises(TaskNotFound):
                    registry.fetch(tenant, version)
    audit = {
        tenant: [
            (entry.actor, entry.action, entry.task, entry.alias, entry.old, entry.new)
            for entry in registry.audit(tenant)
        ]
        for tenant in ("default", "fresh")
    }
    return Seen([_shape(task) for task in tasks], [_shape(item.task) for item in deleted], audit)


def _shape(task: TaskInfo) -> Any:
    """Everything but times."""
    return (
        task.tenant,
        task.name,
        dict(task.aliases),
        {alias: [(entry.version, entry.action) for entry in entries] for alias, entries in task.history.items()},
        sorted(info.version for info in task.versions),
    )


CALLS: tuple[tuple[Any, str], ...] = (
    (io, "open"), (os, "open"), (os, "listdir"), (os, "scandir"), (os, "stat"), (os, "lstat"),
    (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
)  # fmt: skip
"""Everything by which a registry touches the file system, but for what it does with files that it has open."""


@contextmanager
def watched(seen: Callable[[str, Path], object]) -> Iterator[None]:
    """Call ``seen(function, place)`` before each of CALLS, but for its own; ``place`` is where the call leads."""
    looking = False

    def tell(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal looking
            if not looking:
                looking = True
                try:
                    for place in _places(name, args, options):
                        seen(name, place)
                finally:
                    looking = False
            return real(*args, **options)

        return call

    patches = [mock.patch.object(module, name, tell(name, getattr(module, name))) for module, name in CALLS]
    patches.append(mock.patch.object(builtins, "open", tell("open", io.open)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _places(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[Path]:
    """Where a call's paths lead, those within a folder's descriptor too; links are followed where the call does."""
    follows = options.get("follow_symlinks", True) if name == "stat" else name in ("open", "listdir", "scandir")
    if name == "open" and len(args) > 1 and isinstance(args[1], int):
        follows = not args[1] & os.O_NOFOLLOW
    keys = ("src_dir_fd", "dst_dir_fd") if name == "replace" else ("dir_fd",)
    for path, key in zip(args or (".",), keys, strict=False):
        folder = options.get(key)
        if isinstance(path, int):  # a descriptor
            yield _open_at(path)
            continue
        place = Path.cwd() / (_open_at(folder) if folder is not None else "") / os.fsdecode(path)
        yield place.resolve() if follows else place.parent.resolve() / place.name


def _open_at(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()
