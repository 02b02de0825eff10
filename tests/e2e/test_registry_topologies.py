"""Failures of Redis under Sentinels and as a Cluster, seen from replicas under load. Nobody is restarted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefixes.registry import open_registry
from prefixes.registry.redis.keys import REGISTRY, TenantKeys
from prefixes.registry.transfer import open_target, transfer
from tests.support.outage import LATE_S, arguments
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_sentinel import RedisSentinel
from tests.support.redis_server import RedisServer, wait_until
from tests.support.server import ServerProcess, TinyWorld, make_world, metric, wait_for_metric
from tests.support.traffic import ROW, Answer, Requests, Stream, ask, generate, publish

pytestmark = pytest.mark.slow

SEEN_S = 1.0
BOUND_S = 10.0
"""Tells a hang."""
FAILOVER_S = 180.0
"""Tells a hang, too: a Sentinel on a busy machine sees its clock jump, and does nothing for half a minute each time."""

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("backbone"))


@contextmanager
def replicas(world: TinyWorld, url: str, folder: Path, count: int) -> Iterator[list[ServerProcess]]:
    """Ready servers on the registry at ``url``."""
    with ExitStack() as stack:
        started = []
        for number in range(count):
            (folder / str(number)).mkdir()
            process = ServerProcess(folder / str(number), "--registry", url, *arguments(world))
            started.append(stack.enter_context(process))
        yield [process.wait_ready() for process in started]


@contextmanager
def load(server: ServerProcess, world: TinyWorld, task: str = "resident") -> Iterator[tuple[Stream, Requests]]:
    """A row and requests on a resident prefix, all of whose answers must be right."""
    assert publish(server, task, world.prefix(seed=1)).status == 201
    expected = generate(server, task).said
    tokens = generate(server, task, ROW).body["outputs"][0]["token_ids"]
    with Stream(server, task, tokens) as stream, Requests(server, task, expected) as requests:
        stream.wait_for(5, LATE_S)
        requests.wait_for(2, LATE_S)
        yield stream, requests
        stream.wait_for(20, LATE_S)
        requests.wait_for(2, LATE_S)
    assert stream.faults == requests.faults == []


def wait_written(server: ServerProcess, world: TinyWorld, names: str) -> float:
    """Seconds until something can be published again; until then every attempt is refused, in time."""
    began, number = time.monotonic(), 0
    while (answer := publish(server, f"{names}-{number}", world.prefix(seed=2))).status != 201:
        assert answer.status == 503 and answer.seconds < BOUND_S, answer
        assert time.monotonic() - began < FAILOVER_S, answer
        number += 1
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.parametrize("how", ["killed", "stopped", "switched"])
def test_a_failover_under_sentinels_costs_writes_alone_and_for_a_while(
    world: TinyWorld, tmp_path: Path, how: str, record_property: Record
) -> None:
    with RedisSentinel(append_only=True) as sentinel, replicas(world, sentinel.url, tmp_path, 1) as (server,):
        wait_for_metric(server, "prefixd_registry_subscribed", 1)
        with load(server, world) as (stream, requests):
            sentinel.wait_replica()
            if how == "killed":
                sentinel.master.kill()
            elif how == "stopped":
                sentinel.master.pause()
            else:
                sentinel.switch()
            record_property("writable_after_s", wait_written(server, world, "after"))
            record_property("longest_request_s", requests.longest_s)
            record_property("longest_gap_s", stream.longest_gap_s)
            assert requests.longest_s < BOUND_S
            wait_for_metric(server, "prefixd_registry_up", 1)
            wait_for_metric(server, "prefixd_registry_subscribed", 1)
            assert metric(server, "prefixd_registry_wrong_id") == 0
            assert ask(server, "GET", "/prefixes/resident").status == 200
            for stopped in sentinel.servers:
                if stopped.running:
                    stopped.resume()


@dataclass(frozen=True)
class Parts:
    """A Cluster and tenants by whose data is where: with the registry's own id, and on another node."""

    cluster: RedisCluster
    servers: Sequence[ServerProcess]
    near: str
    far: str

    @property
    def home(self) -> RedisServer:
        """The node with the registry's id, and ``near``'s data."""
        return self.cluster.node_of(REGISTRY)

    @property
    def other(self) -> RedisServer:
        """The node with ``far``'s data."""
        return self.cluster.node_of(TenantKeys(self.far).id)


@pytest.fixture
def parts(world: TinyWorld, tmp_path: Path) -> Iterator[Parts]:
    with RedisCluster(append_only=True) as cluster, replicas(world, cluster.url, tmp_path, 2) as servers:
        home = cluster.node_of(REGISTRY)
        tenants = [f"tenant-{number}" for number in range(40)]
        near = next(tenant for tenant in tenants if cluster.node_of(TenantKeys(tenant).id) is home)
        far = next(tenant for tenant in tenants if cluster.node_of(TenantKeys(tenant).id) is not home)
        for tenant in (near, far):
            for name, seed in (("known", 11), ("unknown", 12)):
                assert publish(servers[0], f"{tenant}/{name}", world.prefix(seed=seed)).status == 201
            assert generate(servers[0], f"{tenant}/known").status == 200
        yield Parts(cluster, servers, near, far)


def refused(answer: Answer) -> None:
    assert answer.status == 503 and answer.seconds < BOUND_S, answer
    assert answer.body["error"]["code"] == "registry_unavailable"
    assert int(answer.headers["retry-after"]) >= 1


def test_replicas_on_a_cluster_see_each_others_promotes_by_asking(
    parts: Parts, world: TinyWorld, record_property: Record
) -> None:
    first, second = (
        publish(parts.servers[0], "seen", world.prefix(seed=seed)).body["version"] for seed in (21, 22)
    )
    taken = []
    for move in range(6):
        mover, other = parts.servers[:: 1 if move % 2 else -1]
        target = first if move % 2 == 0 else second
        assert generate(other, "seen").status == 200
        assert ask(mover, "POST", "/prefixes/seen/promote", json={"version": target}).status == 200
        began = time.monotonic()
        while generate(other, "seen").body["version"] != target:
            assert time.monotonic() - began < LATE_S
        taken.append(time.monotonic() - began)
    record_property("seconds", sorted(taken))
    assert sorted(taken)[len(taken) // 2] < SEEN_S
    for server in parts.servers:
        assert metric(server, "prefixd_registry_subscribed") == 0
        assert metric(server, "prefixd_registry_up") == 1


def test_the_lost_part_of_a_cluster_is_its_tenants_outage_alone(parts: Parts, world: TinyWorld) -> None:
    server, near, far = parts.servers[0], parts.near, parts.far
    with load(server, world, f"{near}/resident"):
        said = generate(server, f"{far}/known").said
        parts.other.flush()
        time.sleep(1.5)  # longer than anything is believed unasked
        assert generate(server, f"{far}/known").said == said
        refused(generate(server, f"{far}/unknown"))  # and is not "no such task"
        refused(generate(server, f"{far}/never-was"))
        refused(publish(server, f"{far}/new", world.prefix()))
        refused(ask(server, "GET", f"/prefixes/{far}/known"))
        for other in parts.servers:
            assert generate(other, f"{near}/unknown").status == 200
            assert publish(other, f"{near}/new", world.prefix()).status == 201
            assert ask(other, "GET", "/ready").status == 200
            assert metric(other, "prefixd_registry_up") == 1
        listed = ask(server, "GET", "/prefixes")
        assert listed.status == 200
        assert {task["task"].partition("/")[0] for task in listed.body["prefixes"]} == {near}


def test_a_cluster_that_lost_the_registrys_id_is_an_outage_of_all(parts: Parts, world: TinyWorld) -> None:
    server, near, far = parts.servers[0], parts.near, parts.far
    with load(server, world, f"{far}/resident"):
        parts.home.flush()
        wait_for_metric(server, "prefixd_registry_wrong_id", 1)
        for tenant in (near, far):
            assert generate(server, f"{tenant}/known").status == 200
            refused(generate(server, f"{tenant}/unknown"))
            refused(publish(server, f"{tenant}/new", world.prefix()))
        assert metric(server, "prefixd_registry_up") == 0
        assert ask(server, "GET", "/ready").status == 200


@pytest.mark.parametrize("node", ["home", "other"])
def test_a_restore_of_what_a_cluster_lost_needs_no_restart(
    parts: Parts, world: TinyWorld, node: str, tmp_path: Path
) -> None:
    """With the ``home`` node the registry's id was lost, with the ``other`` one a tenant."""
    server, near, far = parts.servers[0], parts.near, parts.far
    lost, kept = (near, far) if node == "home" else (far, near)
    with closing(open_registry(parts.cluster.url)) as source:
        backup = open_registry(f"disk://{tmp_path / 'backup'}", registry_id=source.id)
        assert transfer(source, backup, mirror=True).bad == 0
    with closing(backup), load(server, world, f"{kept}/resident"):
        assert publish(server, f"{kept}/since", world.prefix(seed=31)).status == 201
        said = generate(server, f"{lost}/known").said
        getattr(parts, node).flush()
        time.sleep(1.5)
        refused(generate(server, f"{lost}/unknown"))
        target = open_target(parts.cluster.url, backup.id)
        assert target is not None
        with closing(target):
            report = transfer(backup, target)
        assert (report.counts()["copied"], report.bad, report.kept) == (2, 0, 1)
        for other in parts.servers:
            wait_for_metric(other, "prefixd_registry_up", 1)
            wait_until(
                lambda: generate(other, f"{lost}/unknown").status == 200, lambda: "not served again", LATE_S  # noqa: B023
            )
            assert generate(other, f"{lost}/known").said == said
            assert generate(other, f"{kept}/since").status == 200
            assert publish(other, f"{lost}/new", world.prefix()).status == 201
            assert metric(other, "prefixd_registry_wrong_id") == 0
        listed = ask(server, "GET", "/prefixes").body["prefixes"]
        assert {task["task"].partition("/")[0] for task in listed} == {near, far}


@pytest.mark.parametrize("node", ["home", "other"])
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_node_that_fails_holds_up_nobody_and_is_used_again_when_it_is_back(
    parts: Parts, world: TinyWorld, node: str, how: str, record_property: Record
) -> None:
    server, near, far = parts.servers[0], parts.near, parts.far
    failing = getattr(parts, node)
    lost = near if node == "home" else far
    longest = 0.0
    with load(server, world) as (_, requests):
        getattr(failing, how)()
        began = time.monotonic()
        while time.monotonic() - began < 6:  # a Cluster itself takes two seconds to notice
            for answer in (
                generate(server, f"{lost}/unknown"),
                publish(server, f"{lost}/new", world.prefix()),
                ask(server, "GET", f"/prefixes/{lost}/known"),
            ):
                refused(answer)
                longest = max(longest, answer.seconds)
            for tenant in (near, far):
                assert generate(server, f"{tenant}/known").status == 200
            assert ask(server, "GET", "/prefixes").seconds < BOUND_S
        record_property("longest_refusal_s", longest)
        record_property("longest_request_s", requests.longest_s)
        assert requests.longest_s < BOUND_S
        failing.start() if how == "kill" else failing.resume()
        parts.cluster.wait_ok()
        began = time.monotonic()
        for tenant in (near, far):
            wait_until(
                lambda: generate(server, f"{tenant}/unknown").status == 200, lambda: "not served again", LATE_S  # noqa: B023
            )
            assert publish(server, f"{tenant}/new", world.prefix()).status == 201
        wait_for_metric(server, "prefixd_registry_up", 1)
        record_property("back_after_s", time.monotonic() - began)
