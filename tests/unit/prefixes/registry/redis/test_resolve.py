"""A reference to a large task in Redis is resolved from its first bytes, and means what the whole task says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from prefixes.artifact import version_of, write_prefix
from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry.limits import RECORD_BYTES
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.registry.transitions import resolved
from prefixes.spec import TaskRef
from tests.support.prefixes import make_prefix
from tests.support.redis_front import Front
from tests.support.redis_registry import VERSIONS, opened, publish
from tests.support.redis_server import RedisServer

KEYS = TenantKeys("default")
LARGE = {"text": "x" * (RECORD_BYTES - 100)}


@pytest.fixture
def registry(server: RedisServer) -> Iterator[RedisRegistry]:
    """``e2e`` with three versions and a megabyte of records; ``other`` with another version."""
    with opened(server.url) as registry:
        publish(registry, 0, 1, record=LARGE)
        publish(registry, 2, alias="canary", record=LARGE)
        publish(registry, 3, name="other")
        yield registry


def test_a_large_task_is_not_read_at_each_resolve(server: RedisServer, registry: RedisRegistry) -> None:
    """Every resolve read the headers and records of all versions, a megabyte here, and parsed them."""
    with Front(server.server_port) as front, opened(f"redis://127.0.0.1:{front.port}") as watched:
        for ref in ("e2e", "e2e@canary", f"e2e@{VERSIONS[0]}", "e2e@nightly", f"e2e@{VERSIONS[3]}"):
            before = front.carried["answers"]
            try:
                watched.resolve(TaskRef.parse(ref))
            except TaskNotFound:
                assert ref in ("e2e@nightly", f"e2e@{VERSIONS[3]}")
            assert front.carried["answers"] - before < 100_000, ref
        assert watched.inspect("default", "e2e").versions[0].record == LARGE


def assert_as_the_whole_task_says(registry: RedisRegistry) -> None:
    task = registry.inspect("default", "e2e")
    for selector in (*task.aliases, *(info.version for info in task.versions)):
        ref = TaskRef.parse(f"e2e@{selector}")
        assert registry.resolve(ref) == resolved(task, ref)


def test_every_reference_means_what_the_whole_task_says(registry: RedisRegistry) -> None:
    assert_as_the_whole_task_says(registry)
    registry.rollback("default", "e2e")
    registry.delete_version("default", "e2e", VERSIONS[1])
    assert_as_the_whole_task_says(registry)
    long = make_prefix(seed=9, template="y" * 300_000 + "{input}")
    registry.publish("default", "e2e", write_prefix(long), record={})
    assert registry.resolve(TaskRef.parse("e2e")).version == version_of(long)
    assert_as_the_whole_task_says(registry)


def test_what_the_task_does_not_have_is_not_found(registry: RedisRegistry) -> None:
    registry.rollback("default", "e2e")
    registry.delete_version("default", "e2e", VERSIONS[1])
    with pytest.raises(TaskNotFound, match="alias 'nightly': expected one of canary, production"):
        registry.resolve(TaskRef.parse("e2e@nightly"))
    for version in (VERSIONS[1], VERSIONS[3], "sha256:" + "0" * 64):
        with pytest.raises(TaskNotFound, match=f"version {version}: expected one of its versions"):
            registry.resolve(TaskRef.parse(f"e2e@{version}"))


@pytest.mark.parametrize("damage", [b"", b"junk", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{" * 20])
def test_a_damaged_artifact_does_not_change_what_a_reference_means(
    registry: RedisRegistry, client: Any, damage: bytes
) -> None:
    client.set(KEYS.blob(VERSIONS[1]), damage)
    client.delete(KEYS.blob(VERSIONS[2]))
    assert_as_the_whole_task_says(registry)


def test_a_task_that_another_program_wrote_is_read_whole(registry: RedisRegistry, client: Any) -> None:
    raw = json.loads(client.get(KEYS.task("e2e")))
    client.set(KEYS.task("e2e"), json.dumps(dict(reversed(raw.items()))))
    assert_as_the_whole_task_says(registry)
    for wrong in ({**raw, "format": 2}, {**raw, "aliases": {"production": "x"}}, {**raw, "aliases": []}):
        client.set(KEYS.task("e2e"), json.dumps(wrong, indent=1, sort_keys=True))
        with pytest.raises(RegistryUnavailable, match="is no task index"):
            registry.resolve(TaskRef.parse("e2e"))


def test_a_version_that_goes_between_the_two_looks_is_not_answered(
    registry: RedisRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = registry.commands.version_head

    def late(*arguments: Any) -> tuple[bool, bytes]:
        monkeypatch.undo()
        registry.rollback("default", "e2e")
        registry.delete_version("default", "e2e", VERSIONS[1])
        registry.gc(retention_s=0)
        return look(*arguments)

    monkeypatch.setattr(registry.commands, "version_head", late)
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[0]
