"""No tenant reaches or learns anything of another's, whatever the two are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prefixes.errors import TaskNotFound
from prefixes.registry.changes import Change, Edit
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.registry.redis.writer import RedisWriter
from prefixes.spec import TaskRef
from tests.support.redis_registry import DATA, VERSIONS, assert_in_step, publish, watched
from tests.support.redis_server import RedisServer


def test_whether_another_tenant_has_a_digest_shows_in_no_answer_and_no_command(
    server: RedisServer, registry: RedisRegistry
) -> None:
    publish(registry, 0, tenant="acme")
    registry.resolve(TaskRef.parse("acme/e2e"))  # Redis has its script now

    def ask() -> list[object]:
        seen: list[object] = []

        def look(call: Callable[[], object]) -> None:
            with watched(registry, lambda _, command: seen.append(command)), pytest.raises(TaskNotFound) as caught:
                call()
            seen.append((caught.value.message, caught.value.detail))

        look(lambda: registry.fetch("acme", VERSIONS[1]))
        look(lambda: registry.fetch("nobody", VERSIONS[1]))
        look(lambda: registry.resolve(TaskRef.parse(f"acme/e2e@{VERSIONS[1]}")))
        look(lambda: registry.promote("acme", "e2e", VERSIONS[1]))
        look(lambda: registry.promote("nobody", "e2e", VERSIONS[1]))
        return seen

    nobody_has_it = ask()
    publish(registry, 1, tenant="other")
    assert ask() == nobody_has_it
    assert len(nobody_has_it) > 10


def test_an_artifact_that_was_leased_but_not_published_is_not_fetched(registry: RedisRegistry) -> None:
    writer = RedisWriter(registry.commands, "default")
    writer.put(VERSIONS[0], DATA[0])
    with pytest.raises(TaskNotFound):
        registry.fetch("default", VERSIONS[0])
    writer.edit("e2e", Edit("publish", "ci", None, lambda before: Change(before)))  # nothing to do is no change
    assert registry.audit("default") == []


def test_no_two_names_of_tenants_and_tasks_share_a_key(registry: RedisRegistry, client: Any) -> None:
    tenants = ["prefixd", "registry", "tenants", "a", "a.b", "a.b.c", "a-b", "a_b", "x" * 64]
    names = ["id", "tasks", "deleted", "blobs", "audit", "a", "a.b", "b", "task", "blob", VERSIONS[0][7:71]]
    expected = {}
    for number, tenant in enumerate(tenants):
        for offset, name in enumerate(names):
            index = (number + offset) % len(DATA)
            publish(registry, index, tenant=tenant, name=name)
            expected[tenant, name] = VERSIONS[index]
    registry.delete("prefixd", "id")
    registry.delete("a", "a.b")
    registry.gc(retention_s=0)
    del expected["prefixd", "id"], expected["a", "a.b"]
    assert {(task.tenant, task.name): task.aliases["production"] for task in registry.tasks()} == expected
    for tenant in tenants:
        assert_in_step(client, registry, tenant)
