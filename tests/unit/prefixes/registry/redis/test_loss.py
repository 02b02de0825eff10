"""Redis emptied, wholly or in part, or another one in its place: an outage, never 'not found', nothing made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefixes.errors import RegistryMissing, RegistryUnavailable, TaskNotFound, WrongRegistry
from prefixes.registry.base import HistoryEntry, TaskInfo, VersionInfo
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.registry.redis.writer import RedisWriter
from prefixes.spec import TaskRef
from tests.support.redis_registry import (
    DATA,
    PREFIXES,
    VERSIONS,
    Command,
    assert_in_step,
    opened,
    prepare,
    publish,
    watched,
)
from tests.support.redis_server import SERVERS, RedisServer

Call = Callable[[RedisRegistry], object]

TASK = "default/e2e"
AT = "2026-01-01T00:00:00.000Z"
FOREIGN = TaskInfo(
    "default",
    "foreign",
    {"production": VERSIONS[3]},
    {"production": (HistoryEntry(VERSIONS[3], AT, "publish"),)},
    (VersionInfo(VERSIONS[3], len(DATA[3]), AT, PREFIXES[3].spec),),
)
READS: dict[str, Call] = {
    "resolve": lambda registry: registry.resolve(TaskRef.parse(TASK)),
    "inspect": lambda registry: registry.inspect("default", "e2e"),
    "fetch": lambda registry: registry.fetch("default", VERSIONS[0]),
    "tasks": lambda registry: registry.tasks(),
    "tasks of a tenant": lambda registry: registry.tasks("default"),
    "deleted": lambda registry: registry.deleted(),
    "deleted of a tenant": lambda registry: registry.deleted("default"),
    "audit": lambda registry: registry.audit("default"),
}
WRITES: dict[str, Call] = {
    "publish": lambda registry: publish(registry, 2),
    "publish a known version": lambda registry: publish(registry, 0),
    "promote": lambda registry: registry.promote("default", "e2e", VERSIONS[0]),
    "rollback": lambda registry: registry.rollback("default", "e2e"),
    "delete": lambda registry: registry.delete("default", "e2e"),
    "undelete": lambda registry: registry.undelete("default", "gone"),
    "adopt": lambda registry: registry.adopt(FOREIGN, lambda version: DATA[3]),
    "publish for a new tenant": lambda registry: publish(registry, 2, tenant="newcomer"),
    "gc": lambda registry: registry.gc(retention_s=0),
}
UNKNOWN: dict[str, Call] = {
    "check": lambda registry: registry.check(),
    "a task that never was": lambda registry: registry.resolve(TaskRef.parse("default/other")),
    "a tenant that never was": lambda registry: registry.resolve(TaskRef.parse("nobody/e2e")),
    "an artifact that never was": lambda registry: registry.fetch("nobody", VERSIONS[3]),
    "an artifact of another tenant": lambda registry: registry.fetch("nobody", VERSIONS[0]),
    "an audit that never was": lambda registry: registry.audit("nobody"),
}
CALLS = READS | WRITES | UNKNOWN


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    shared.flush()
    return shared


def contents(client: Any) -> dict[bytes, bytes]:
    """Every key and what it holds."""
    return {key: client.dump(key) for key in client.scan_iter(count=1000)}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_emptied_redis_is_an_outage_and_stays_empty(server: RedisServer, call: Call) -> None:
    with opened(server.url) as registry, server.client() as client:
        prepare(registry)
        server.flush()
        for _ in range(2):  # the first call makes nothing that the second would take for a registry
            with pytest.raises(WrongRegistry):
                call(registry)
            assert client.keys() == []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_another_registry_in_its_place_is_an_outage_and_is_left_alone(server: RedisServer, call: Call) -> None:
    with opened(server.url) as registry, server.client() as client:
        prepare(registry)
        server.flush()
        with opened(server.url) as other:
            prepare(other)  # the same tenants, tasks and artifacts
            before = contents(client)
            with pytest.raises(WrongRegistry):
                call(registry)
            assert contents(client) == before
            assert other.resolve(TaskRef.parse(TASK)).version == VERSIONS[1]


def test_an_emptied_redis_is_not_made_anew_by_whoever_must_not(server: RedisServer) -> None:
    with opened(server.url) as registry, server.client() as client:
        prepare(registry)
        server.flush()
        with pytest.raises(RegistryMissing), opened(server.url, create=False):
            pass
        assert client.keys() == []
        with opened(server.url, registry_id=registry.id) as restored:  # what a restore does
            assert restored.id == registry.id
        registry.check()
        with pytest.raises(TaskNotFound):
            registry.resolve(TaskRef.parse(TASK))
        publish(registry, 1)
        assert registry.resolve(TaskRef.parse(TASK)).version == VERSIONS[1]


def test_a_registry_that_is_not_the_one_expected_is_not_opened(server: RedisServer) -> None:
    with (
        opened(server.url) as registry,
        pytest.raises(WrongRegistry, match=f"expected another, got {registry.id}"),
        opened(server.url, registry_id="another"),
    ):
        pass


class Losing:
    """Empties the server ahead of the command of a given number, and notes whether the call had begun its change."""

    def __init__(self, server: RedisServer, registry: RedisRegistry, number: int) -> None:
        self.lost = self.had_begun = False
        self._server, self._begin, self._number = server, registry.commands._begin.sha, number

    def __call__(self, number: int, command: Command) -> None:
        if number == self._number:
            self._server.flush()
            self.lost = True
        self.had_begun |= not self.lost and self._begin in command


def loses(server: RedisServer, registry: RedisRegistry) -> Iterator[Losing]:
    """One ``Losing`` for every command of a call, each over a registry made again; ends when one is not reached."""
    for number in range(1, 100):
        server.flush()
        with opened(server.url, registry_id=registry.id) as again:
            prepare(again)
        losing = Losing(server, registry, number)
        yield losing
        if not losing.lost:
            assert number > 1
            return


@pytest.mark.parametrize("call", READS.values(), ids=READS)
def test_data_lost_in_the_middle_of_a_read_is_never_an_answer(server: RedisServer, call: Call) -> None:
    with opened(server.url) as registry:
        for losing in loses(server, registry):
            expected = call(registry)
            with watched(registry, losing):
                try:
                    assert call(registry) == expected
                except WrongRegistry:
                    assert losing.lost


@pytest.mark.parametrize("name", WRITES)
def test_data_lost_in_the_middle_of_a_write_are_never_written_over(server: RedisServer, name: str) -> None:
    """Whoever opens the emptied Redis finds no registry, and the handle knows that its own is lost."""
    with opened(server.url) as registry, server.client() as client:
        for losing in loses(server, registry):
            with watched(registry, losing):
                try:
                    WRITES[name](registry)
                    assert losing.had_begun or name == "gc"
                except WrongRegistry:
                    assert losing.lost
            if losing.lost:
                assert list(client.scan_iter(match="{prefixd}*")) == []
                kinds = {key.decode().split(":")[2] for key in client.scan_iter()}
                assert kinds <= {"id", "blob"}  # what one command stored just behind the loss; no script goes on
                with pytest.raises(RegistryMissing):
                    registry.check()
                with pytest.raises(RegistryMissing), opened(server.url, create=False):
                    pass
                with opened(server.url, registry_id=registry.id, restoring=True) as restored:
                    restored.adopt(FOREIGN, lambda version: DATA[3])
                    restored.finish_restoring()
                assert [task.name for task in registry.tasks()] == ["foreign"]


def test_a_clean_up_under_way_takes_nothing_of_a_registry_that_took_the_place(server: RedisServer) -> None:
    with opened(server.url) as registry, server.client() as client:
        store_unnamed(registry)

        def replace(_: int, command: Command) -> None:
            if registry.commands._collect.sha in command:
                server.flush()
                with opened(server.url) as other:
                    store_unnamed(other)

        with watched(registry, replace):
            assert registry.gc(retention_s=0).artifacts == ()
        assert client.exists(TenantKeys("default").blob(VERSIONS[0]))
        with opened(server.url) as other:
            assert other.gc(retention_s=0).artifacts == (f"default/{VERSIONS[0]}",)


def store_unnamed(registry: RedisRegistry) -> None:
    """An artifact that nothing names and nobody leases."""
    writer = RedisWriter(registry.commands, "default")
    writer.put(VERSIONS[0], DATA[0])
    writer.close()


@pytest.mark.parametrize("binary", SERVERS.values(), ids=SERVERS)
def test_what_was_published_outlives_a_killed_server(binary: Any) -> None:
    with RedisServer(binary, append_only=True) as server, opened(server.url) as registry:
        prepare(registry)
        before = registry.tasks(), registry.deleted(), registry.audit("default")
        server.kill()
        with pytest.raises(RegistryUnavailable, match="Connection refused"):
            registry.tasks()
        server.start()
        assert (registry.tasks(), registry.deleted(), registry.audit("default")) == before
        assert registry.fetch("default", VERSIONS[0]) == DATA[0]
        assert registry.rollback("default", "e2e").aliases == {"production": VERSIONS[0]}  # its scripts are gone
        with server.client() as client:
            assert_in_step(client, registry, "default")


def test_a_server_without_a_file_that_was_killed_is_an_outage() -> None:
    with RedisServer() as server, opened(server.url) as registry:
        prepare(registry)
        server.kill()
        server.start()
        with pytest.raises(RegistryMissing):
            registry.resolve(TaskRef.parse(TASK))
