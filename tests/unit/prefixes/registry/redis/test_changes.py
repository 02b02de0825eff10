"""A change that is cut off, comes too late or finds Redis full is made whole and once, or never."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from prefixes.artifact import write_prefix
from prefixes.errors import RegistryUnavailable
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.registry.redis.writer import RedisWriter
from prefixes.spec import TaskRef
from tests.support.prefixes import make_prefix
from tests.support.redis_front import Front
from tests.support.redis_registry import DATA, VERSIONS, actions, assert_in_step, opened, publish
from tests.support.redis_server import SERVERS, RedisServer, wait_until

KEYS = TenantKeys("default")


@pytest.mark.parametrize("action", ["rollback", "publish", "delete", "delete_version", "undelete"])
def test_a_change_whose_answer_was_lost_is_made_once(server: RedisServer, client: Any, action: str) -> None:
    """Rolling back is the telling one: made twice, it goes two versions back."""
    with opened(server.url) as near:
        publish(near, 0, 1, 2)
        publish(near, 3, name="gone")
        near.delete("default", "gone")
        before = len(near.audit("default"))
    with Front(server.server_port) as front, opened(f"redis://127.0.0.1:{front.port}?timeout_s=20") as registry:
        commit, commits = registry.commands.commit, 0

        def lose_the_answer(*args: Any, **options: Any) -> str:
            nonlocal commits
            commits += 1
            front.delay_s = 60.0
            cutter = threading.Thread(target=cut_once_made)
            cutter.start()
            try:
                return commit(*args, **options)
            finally:
                cutter.join(30)

        def cut_once_made() -> None:
            wait_until(lambda: client.xlen(KEYS.audit) == before + 1, lambda: "the change was not made")
            front.delay_s = 0.0
            front.cut()

        registry.commands.commit = lose_the_answer  # type: ignore[method-assign]
        match action:
            case "rollback":
                assert registry.rollback("default", "e2e").aliases == {"production": VERSIONS[1]}
            case "publish":
                assert registry.publish("default", "e2e", DATA[3], record={}).version == VERSIONS[3]
            case "delete":
                registry.delete("default", "e2e")
            case "delete_version":
                registry.delete_version("default", "e2e", VERSIONS[1])
            case "undelete":
                assert registry.undelete("default", "gone").aliases == {"production": VERSIONS[3]}
        assert commits == 1
    with opened(server.url) as near:
        assert len(near.audit("default")) == before + 1
        assert near.audit("default")[0].action == action
        assert_in_step(client, near, "default")
        if action == "rollback":
            assert [entry.action for entry in near.inspect("default", "e2e").history["production"]][-2:] == [
                "publish",
                "rollback",
            ]


@pytest.mark.parametrize("binary", SERVERS.values(), ids=SERVERS)
def test_a_change_that_was_answered_with_an_error_is_not_made_when_a_stopped_server_goes_on(binary: Any) -> None:
    with RedisServer(binary) as server, opened(f"{server.url}?timeout_s=0.3") as registry, server.client() as client:
        publish(registry, 0, 1)
        before = registry.inspect("default", "e2e")
        commit = registry.commands.commit

        def stopped(*args: Any, **options: Any) -> str:
            server.pause()  # the change is sent, and lies in the server's socket
            return commit(*args, **options)

        registry.commands.commit = stopped  # type: ignore[method-assign]
        began = time.monotonic()
        with pytest.raises(RegistryUnavailable, match="did not answer in time"):
            registry.promote("default", "e2e", VERSIONS[0])
        assert time.monotonic() - began < 5  # of 0.3: a busy machine
        server.resume()
        evals = client.info("commandstats")["cmdstat_evalsha"]["calls"]  # answered: what lay in the socket was read
        registry.commands.commit = commit  # type: ignore[method-assign]
        time.sleep(0.1)
        assert registry.inspect("default", "e2e") == before
        assert actions(registry.audit("default")) == ["publish", "publish"]
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] >= evals
        assert registry.promote("default", "e2e", VERSIONS[0]).aliases == {"production": VERSIONS[0]}


def test_a_late_change_is_refused_by_the_server_itself(registry: RedisRegistry, client: Any) -> None:
    publish(registry, 0, 1)
    before = registry.inspect("default", "e2e")
    begin = registry.commands.begin
    registry.commands.begin = lambda *args: (begin(*args)[0] - 60_000, begin(*args)[1])  # type: ignore[method-assign]
    with pytest.raises(RegistryUnavailable, match="took too long; nothing was changed"):
        registry.promote("default", "e2e", VERSIONS[0])
    with pytest.raises(RegistryUnavailable, match="took too long"):
        registry.delete("default", "e2e")
    del registry.commands.begin
    assert registry.inspect("default", "e2e") == before
    assert registry.deleted() == []
    assert_in_step(client, registry, "default")


def test_a_server_that_stops_bounds_every_call() -> None:
    with RedisServer() as server, opened(f"{server.url}?timeout_s=0.2") as registry:
        publish(registry, 0, 1)
        server.pause()
        calls: list[Callable[[], object]] = [
            lambda: registry.resolve(TaskRef.parse("e2e")),
            lambda: registry.tasks(),
            lambda: registry.check(),
            lambda: publish(registry, 2),
            lambda: registry.rollback("default", "e2e"),
            lambda: registry.gc(),
            lambda: registry.preflight(),
        ]
        for call in calls:
            began = time.monotonic()
            with pytest.raises(RegistryUnavailable, match="did not answer in time"):
                call()
            assert time.monotonic() - began < 3
        server.resume()
        assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]


def test_leases_that_cannot_be_given_back_are_not_waited_for_one_by_one() -> None:
    with RedisServer() as server, opened(f"{server.url}?timeout_s=0.3") as registry:
        writer = RedisWriter(registry.commands, "default")
        for version, data in zip(VERSIONS, DATA, strict=True):
            writer.put(version, data)
        writer._leased *= 5
        server.pause()
        began = time.monotonic()
        writer.close()
        assert time.monotonic() - began < 3  # twenty leases of 0.3 s, were they waited for


@pytest.mark.parametrize("actor", ["", "ünï ☕", 'a"b\\c\n\x00', "x" * 5000])
def test_an_entry_is_kept_whatever_the_actor_is_called(registry: RedisRegistry, client: Any, actor: str) -> None:
    """An empty one made the entry's fields uneven: the change was made, without its entry, and an error answered."""
    publish(registry, 0, actor=actor)
    registry.delete("default", "e2e", actor=actor)
    assert [entry.actor for entry in registry.audit("default")] == [actor, actor]
    assert_in_step(client, registry, "default")


def test_a_text_that_redis_refuses_changes_nothing(registry: RedisRegistry, client: Any) -> None:
    publish(registry, 0)
    with pytest.raises(RegistryUnavailable):
        registry.delete("default", "e2e", actor="\ud800")
    assert actions(registry.audit("default")) == ["publish"]
    assert_in_step(client, registry, "default")


BIG = write_prefix(make_prefix(seed=9, length=2000))


def test_a_full_redis_refuses_to_publish_but_still_rolls_back_deletes_and_cleans_up(
    registry: RedisRegistry, client: Any
) -> None:
    publish(registry, 0, 1)
    publish(registry, 2, name="old")
    registry.delete("default", "old")
    before = registry.tasks()
    client.config_set("maxmemory", client.info("memory")["used_memory"] - 1)
    try:
        with pytest.raises(RegistryUnavailable, match="Redis is full; raise its maxmemory"):
            registry.publish("default", "big", BIG, record={})
        with pytest.raises(RegistryUnavailable, match="Redis is full"):
            registry.publish("newcomer", "big", BIG, record={})
        assert registry.tasks() == before
        assert registry.tasks("newcomer") == []
        assert registry.rollback("default", "e2e").aliases == {"production": VERSIONS[0]}
        assert registry.promote("default", "e2e", VERSIONS[1]).aliases == {"production": VERSIONS[1]}
        report = registry.gc(retention_s=0)
        assert report.tasks == ("default/old",)
        assert f"default/{VERSIONS[2]}" in report.artifacts
        registry.delete("default", "e2e")
        assert_in_step(client, registry, "default")
    finally:
        client.config_set("maxmemory", 0)
    registry.undelete("default", "e2e")
    version = registry.publish("default", "big", BIG, record={}).version
    assert registry.fetch("default", version) == BIG
    assert_in_step(client, registry, "default")


def test_an_artifact_that_fills_redis_up_leaves_nothing_to_see(registry: RedisRegistry, client: Any) -> None:
    publish(registry, 0)
    client.config_set("maxmemory", client.info("memory")["used_memory"] + len(BIG) // 2)
    try:
        for _ in range(3):  # Redis takes a write while it is below, and is above then
            with pytest.raises(RegistryUnavailable, match="Redis is full"):
                for index in range(8):
                    registry.publish("default", f"big-{index}", BIG, record={"pad": "x" * 100_000})
        assert_in_step(client, registry, "default")
    finally:
        client.config_set("maxmemory", 0)
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]
