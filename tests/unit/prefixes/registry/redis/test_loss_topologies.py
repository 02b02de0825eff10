"""A node of a Cluster that is lost or hangs is an outage for its own tenants; a failover needs no new handle."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from prefixes.errors import RegistryMissing, RegistryUnavailable, WrongRegistry
from prefixes.spec import TaskRef
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_registry import DATA, VERSIONS, assert_in_step, opened, prepare, publish
from tests.support.redis_sentinel import RedisSentinel


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as cluster:
        yield cluster


@pytest.mark.slow
def test_of_a_cluster_with_one_node_emptied_its_tenants_are_out_and_the_others_go_on(cluster: RedisCluster) -> None:
    cluster.flush()
    home = cluster.node_of("{prefixd}")
    tenants: dict[int, str] = {}
    for number in range(60):
        tenants.setdefault(cluster.node_of(f"{{tenant{number}}}").port, f"tenant{number}")
    assert len(tenants) == 3
    near = tenants.pop(home.port)
    lost, other = tenants.values()
    with opened(cluster.url) as registry:
        for tenant in (near, lost, other):
            publish(registry, 0, 1, tenant=tenant)
        cluster.node_of(f"{{{lost}}}").flush()
        for _ in range(2):
            for call in (
                lambda: registry.resolve(TaskRef.parse(f"{lost}/e2e")),
                lambda: registry.resolve(TaskRef.parse(f"{lost}/other")),
                lambda: registry.fetch(lost, VERSIONS[0]),
                lambda: registry.fetch(lost, VERSIONS[2]),
                lambda: registry.tasks(lost),
                lambda: registry.tasks(),  # a list that silently lacks some would be believed
                lambda: registry.deleted(lost),
                lambda: registry.audit(lost),
                lambda: publish(registry, 2, tenant=lost),
                lambda: registry.rollback(lost, "e2e"),
                lambda: registry.delete(lost, "e2e"),
                lambda: registry.undelete(lost, "e2e"),
            ):
                with pytest.raises(WrongRegistry):
                    call()
            assert [failed.partition(":")[0] for failed in registry.gc().failed] == [lost]
        with cluster.node_of(f"{{{lost}}}").client() as client:
            assert client.keys() == []
        for tenant in (near, other):
            assert registry.rollback(tenant, "e2e").aliases == {"production": VERSIONS[0]}
            assert registry.fetch(tenant, VERSIONS[0]) == DATA[0]
            publish(registry, 2, tenant=tenant)
            assert [task.name for task in registry.tasks(tenant)] == ["e2e"]
        registry.check()


@pytest.mark.slow
def test_of_a_cluster_without_the_node_that_knows_the_tenants_nothing_is_made_anew(cluster: RedisCluster) -> None:
    cluster.flush()
    home = cluster.node_of("{prefixd}")
    tenant = next(name for name in map("tenant{}".format, range(60)) if cluster.node_of(f"{{{name}}}") is not home)
    with opened(cluster.url) as registry:
        publish(registry, 0, 1, tenant=tenant)
        home.flush()
        for call in (
            lambda: registry.check(),
            lambda: registry.tasks(),
            lambda: publish(registry, 2, tenant="newcomer"),
            lambda: registry.resolve(TaskRef.parse("newcomer/e2e")),
        ):
            with pytest.raises(RegistryMissing):
                call()
        assert registry.resolve(TaskRef.parse(f"{tenant}/e2e")).version == VERSIONS[1]  # its own data are whole


@pytest.mark.slow
def test_a_stopped_node_of_a_cluster_bounds_every_call_and_needs_no_new_handle(cluster: RedisCluster) -> None:
    cluster.flush()
    with opened(f"{cluster.url}?timeout_s=0.5") as registry:
        publish(registry, 0, 1)
        node = cluster.node_of("{default}")
        node.pause()
        try:
            for call in (
                lambda: registry.resolve(TaskRef.parse("e2e")),
                lambda: registry.rollback("default", "e2e"),
                lambda: publish(registry, 2),
            ):
                began = time.monotonic()
                with pytest.raises(RegistryUnavailable):
                    call()
                assert time.monotonic() - began < 10
        finally:
            node.resume()
        cluster.wait_ok()
        assert registry.rollback("default", "e2e").aliases == {"production": VERSIONS[0]}


@pytest.mark.slow
def test_a_failover_under_sentinels_needs_no_new_handle() -> None:
    with RedisSentinel() as sentinel, opened(sentinel.url) as registry:
        prepare(registry)
        sentinel.wait_replica()
        before = registry.tasks(), registry.deleted(), registry.audit("default")
        new = sentinel.failover()
        assert (registry.tasks(), registry.deleted(), registry.audit("default")) == before
        assert registry.rollback("default", "e2e").aliases == {"production": VERSIONS[0]}
        with new.client() as client:
            assert_in_step(client, registry, "default")
