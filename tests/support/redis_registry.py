"""What tests of the registry in Redis share: artifacts, reads of Redis without the registry, faults at a given command.

Owns no server: those are in ``redis_server.py``. Knows no test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any
from unittest import mock

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.registry import open_registry
from prefixes.registry.base import AuditEntry, Registry
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.spec import TaskRef
from tests.support.prefixes import make_prefix

PREFIXES = [make_prefix(seed=seed) for seed in range(4)]
DATA = [write_prefix(prefix) for prefix in PREFIXES]
VERSIONS = [version_of(prefix) for prefix in PREFIXES]

Command = tuple[Any, ...]


@contextmanager
def opened(url: str, **options: Any) -> Iterator[RedisRegistry]:
    """The registry at ``url``, closed at the end."""
    with closing(open_registry(url, **options)) as registry:
        assert isinstance(registry, RedisRegistry)
        yield registry


def publish(registry: Registry, *indices: int, tenant: str = "default", name: str = "e2e", **options: Any) -> None:
    """Publish artifacts by their number, one after the other."""
    for index in indices:
        registry.publish(tenant, name, DATA[index], **{"record": {}, "actor": "ci", **options})


def prepare(registry: Registry) -> None:
    """``e2e`` with versions 0 and 1, and ``gone``, deleted, with version 2."""
    publish(registry, 0, 1)
    publish(registry, 2, name="gone")
    registry.delete("default", "gone")


def resolve(registry: Registry, ref: str) -> int:
    """The number of the artifact that ``ref`` means now."""
    return VERSIONS.index(registry.resolve(TaskRef.parse(ref)).version)


@contextmanager
def watched(registry: RedisRegistry, before: Callable[[int, Command], None]) -> Iterator[None]:
    """Call ``before(number, command)``, counting from 1, ahead of every command that the registry sends."""
    number = 0

    def wrapped(execute: Callable[..., Any]) -> Callable[..., Any]:
        def execute_command(*command: Any, **options: Any) -> Any:
            nonlocal number
            number += 1
            before(number, command)
            return execute(*command, **options)

        return execute_command

    client, blobs = registry.commands._client, registry.commands._reads
    with (
        mock.patch.object(client, "execute_command", wrapped(client.execute_command)),
        mock.patch.object(blobs, "execute_command", wrapped(blobs.execute_command)),
    ):
        yield


def assert_in_step(client: Any, registry: RedisRegistry, tenant: str) -> None:
    """What Redis holds of a tenant agrees with itself: artifacts, who names them, their list, and the audit."""
    keys = TenantKeys(tenant)
    tasks = {task.name: task for task in registry.tasks(tenant)}
    named: dict[str, set[str]] = {}
    for task in tasks.values():
        for info in task.versions:
            named.setdefault(info.version, set()).add(task.name)
    for key, raw in client.hgetall(keys.deleted).items():
        for version in json.loads(raw)["versions"]:
            named.setdefault(version["version"], set()).add(key.decode())
    for version, names in named.items():
        read_prefix(registry.fetch(tenant, version), expected_version=version)
        assert {name.decode() for name in client.smembers(keys.names(version))} == names
    listed = {version.decode() for version in client.smembers(keys.blobs)}
    stored = {key.decode() for key in client.scan_iter(match=keys.blob("*"), count=1000)}
    assert set(named) <= listed
    assert stored <= {keys.blob(version) for version in listed}
    naming = {key.decode() for key in client.scan_iter(match=keys.names("*"), count=1000)}
    assert naming == {keys.names(version) for version in named}

    last: dict[str, str | None] = {}
    for entry in reversed(registry.audit(tenant, limit=100_000)):
        if entry.action in ("purge", "delete_version"):
            continue  # of one that was deleted before; moves no alias
        assert entry.old == last.get(entry.task), entry
        last[entry.task] = entry.new
    production = {f"{tenant}/{name}": task.aliases.get("production") for name, task in tasks.items()}
    assert {task: version for task, version in last.items() if version} == {k: v for k, v in production.items() if v}


def multiply(client: Any, tenant: str, name: str, names: Iterable[str]) -> None:
    """Register ``names`` with what ``name`` has, as publishing each would, but for the marks of their changes.

    ``publish`` takes some milliseconds, and tests of scale have a hundred thousand tasks to make.
    """
    keys = TenantKeys(tenant)
    raw = client.get(keys.task(name))
    infos = json.loads(raw)["versions"]
    versions = [version["version"] for version in infos]
    more = 0
    _, entry = next(item for item in client.xrange(keys.audit) if item[1][b"task"] == f"{tenant}/{name}".encode())
    for chunk in batched(names, 5000):
        with client.pipeline(transaction=False) as batch:
            for other in chunk:
                batch.set(keys.task(other), raw.replace(f"{tenant}/{name}".encode(), f"{tenant}/{other}".encode()))
                batch.xadd(keys.audit, {**entry, b"task": f"{tenant}/{other}"})
            batch.sadd(keys.tasks, *chunk)
            for version in versions:
                batch.sadd(keys.names(version), *chunk)
            batch.execute()
        more += len(set(chunk) - {name})
    added = {"tasks": more, "versions": more * len(infos), "bytes": more * sum(info["size"] for info in infos)}
    for field, count in added.items():
        client.hincrby(keys.total, field, count)
    client.hset(keys.total, "at", client.xrevrange(keys.audit, count=1)[0][0])


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """``items`` in lists of at most ``size``."""
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk


def actions(entries: list[AuditEntry]) -> list[str]:
    """What was done, the latest first."""
    return [entry.action for entry in entries]
