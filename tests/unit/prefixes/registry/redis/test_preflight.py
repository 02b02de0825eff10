"""Whether a Redis is fit to keep a registry, asked of real servers set up well and badly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.registry.redis.preflight import inspect_info
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_registry import opened, publish
from tests.support.redis_sentinel import RedisSentinel
from tests.support.redis_server import SERVERS, RedisServer, wait_until

GOOD = {"redis_version": "7.2.4", "role": "master", "maxmemory_policy": "noeviction", "aof_enabled": 1}


@pytest.fixture(params=SERVERS)
def binary(request: pytest.FixtureRequest) -> Path:
    return SERVERS[request.param]


@pytest.fixture(params=SERVERS, scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(SERVERS[request.param], append_only=True) as server:
        yield server


@pytest.fixture
def set_up(server: RedisServer) -> Iterator[Any]:
    """Sets the server's options, and back."""
    with server.client() as client:
        before = client.config_get()

        def change(**options: str) -> None:
            for name, value in options.items():
                client.config_set(name.replace("_", "-"), value)

        yield change
        for name in ("maxmemory", "maxmemory-policy", "appendonly", "save"):
            client.config_set(name, before[name])
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], lambda: "still rewriting")


def test_a_server_set_up_as_advised_has_nothing_to_say(server: RedisServer) -> None:
    with opened(server.url) as registry:
        assert registry.preflight() == []


def test_a_server_that_would_throw_prefixes_away_is_refused(server: RedisServer, set_up: Any) -> None:
    set_up(maxmemory="100mb", maxmemory_policy="allkeys-lru")
    with (
        opened(server.url) as registry,
        pytest.raises(
            RegistryUnavailable, match="expected noeviction, got allkeys-lru: set `maxmemory-policy noeviction`"
        ),
    ):
        registry.preflight()


def test_eviction_without_a_limit_is_a_warning(server: RedisServer, set_up: Any) -> None:
    set_up(maxmemory="0", maxmemory_policy="volatile-lru")
    with opened(server.url) as registry:
        (warning,) = registry.preflight()
    assert "expected noeviction, got volatile-lru" in warning
    assert "as soon as there is a maxmemory" in warning


def test_memory_near_its_limit_is_a_warning(server: RedisServer, set_up: Any) -> None:
    with opened(server.url) as registry, server.client() as client:
        set_up(maxmemory=str(client.info("memory")["used_memory"]))  # which comes and goes by some per cent
        (warning,) = registry.preflight()
        assert "over 90 % of the maxmemory" in warning
        set_up(maxmemory=str(client.info("memory")["used_memory"] * 2))
        assert registry.preflight() == []


def test_a_server_without_persistence_is_a_warning_that_says_what_to_set(server: RedisServer, set_up: Any) -> None:
    set_up(appendonly="no", save="")
    with opened(server.url) as registry:
        (warning,) = registry.preflight()
    assert warning == "persistence: expected the append-only file, found none in use: set `appendonly yes`"


def test_snapshots_alone_are_a_warning_of_their_own(binary: Path) -> None:
    with RedisServer(binary) as server, server.client() as client, opened(server.url) as registry:
        time.sleep(2.1)  # the server counts in whole seconds: its first snapshot must be later than its start
        publish(registry, 0)
        client.save()
        (warning,) = registry.preflight()
    assert "snapshots alone: the last minutes are lost with a crash: set `appendonly yes`" in warning


def test_a_replica_is_read_and_refused_for_writing(binary: Path) -> None:
    at_once = {"repl-diskless-sync-delay": "0"}
    with RedisServer(binary, config=at_once) as master, RedisServer(binary) as replica, opened(master.url) as registry:
        publish(registry, 0)
        with replica.client() as client:
            client.replicaof("127.0.0.1", master.server_port)
            wait_until(lambda: client.dbsize() > 0, lambda: "no replication")
            with opened(replica.url, create=False) as copy:
                assert copy.tasks() == registry.tasks()
                with pytest.raises(RegistryUnavailable, match="expected Redis' master, got a replica"):
                    copy.preflight()
                with pytest.raises(RegistryUnavailable, match=r"(?i)read.?only"):
                    publish(copy, 1)
                with pytest.raises(RegistryUnavailable, match=r"(?i)read.?only"):
                    copy.delete("default", "e2e")
        assert [len(task.versions) for task in registry.tasks()] == [1]


def test_a_user_who_may_not_ask_is_told(server: RedisServer) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", "-info")
    with (
        opened(f"redis://app:pw@{server.address}") as registry,
        pytest.raises(RegistryUnavailable, match="no permissions"),
    ):
        registry.preflight()


@pytest.mark.slow
def test_a_node_of_a_cluster_is_not_taken_for_a_server() -> None:
    with RedisCluster() as cluster:
        home = cluster.node_of("{prefixd}")
        for node in cluster.nodes:
            with (
                pytest.raises(RegistryUnavailable, match=r"a Cluster, whose URL is redis\+cluster://") as caught,
                opened(node.url) as registry,
            ):
                assert node is home  # the others do not even hold the registry's id
                registry.preflight()
            assert "127.0.0.1" not in caught.value.message
        with opened(cluster.url) as registry:
            assert [warning.partition(":")[0] for warning in registry.preflight()] == ["persistence"]
        with cluster.nodes[2].client() as client:
            client.config_set("maxmemory", "100mb")
            client.config_set("maxmemory-policy", "allkeys-lru")
        with opened(cluster.url) as registry, pytest.raises(RegistryUnavailable, match="got allkeys-lru"):
            registry.preflight()  # one node in three


@pytest.mark.slow
def test_the_master_that_sentinels_name_is_the_one_asked() -> None:
    with RedisSentinel(append_only=True) as sentinel, opened(sentinel.url) as registry:
        assert registry.preflight() == []


def test_one_server_is_not_taken_for_a_cluster_or_a_sentinel(server: RedisServer) -> None:
    with pytest.raises(RegistryUnavailable, match="expected a Redis Cluster"), opened(f"redis+cluster://{server.address}"):
        pass
    with pytest.raises(RegistryUnavailable), opened(f"redis+sentinel://{server.address}/main"):
        pass


@pytest.mark.parametrize("version", ["5.0.14", "6.0.20", "6.1", "6", "", "unknown"])
def test_a_server_that_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(RegistryUnavailable, match=r"expected Redis 6\.2 or newer, got"):
        inspect_info({**GOOD, "redis_version": version})


@pytest.mark.parametrize("version", ["6.2", "6.2.18", "7.2.4", "8.0.1", "10.0.0", "7.4-rc1", "255.255.255"])
def test_a_server_that_is_new_enough_is_not(version: str) -> None:
    assert inspect_info({**GOOD, "redis_version": version}) == []


def test_a_managed_service_that_tells_little_is_taken() -> None:
    """Some leave out fields of INFO, persistence above all, or name roles and policies in their own way."""
    (warning,) = inspect_info({"redis_version": "7.1.0"})
    assert warning.startswith("persistence: expected the append-only file")
    assert inspect_info({"redis_version": "7.1.0", "aof_enabled": 1, "maxmemory": 0}) == []
    assert inspect_info({"redis_version": "7.1.0", "aof_enabled": "1", "role": "primary", "maxmemory": "1000"}) == []


def test_an_append_only_file_that_cannot_be_written_is_a_warning() -> None:
    (warning,) = inspect_info({**GOOD, "aof_last_write_status": "err"})
    assert "last write to its append-only file failed" in warning
