"""Announcements: they arrive, whoever is live has lost none, and whoever may have lost some is told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.registry.subscription import Subscription
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_front import Front
from tests.support.redis_registry import VERSIONS, opened, publish
from tests.support.redis_sentinel import RedisSentinel
from tests.support.redis_server import SERVERS, RedisServer, wait_until

SOON_S = 1.0
"""Within which a change must be known, and a silence noticed."""
BUSY_S = 5.0
"""More than a second, for the machine's sake, where what is meant is soon."""

Change = tuple[str, str]


@contextmanager
def subscribed(registry: RedisRegistry, on_change: Callable[[str, str], None]) -> Iterator[Subscription]:
    """A subscription that is live."""
    subscription = registry.subscribe(on_change)
    assert subscription is not None
    with closing(subscription):
        wait_until(subscription.live, lambda: "never live", 10)
        yield subscription


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(SERVERS[request.param]) as server:
        yield server


def soon(ready: Callable[[], bool], what: str, timeout_s: float = BUSY_S) -> None:
    wait_until(ready, lambda: what, timeout_s)


def test_every_kind_of_change_is_announced_in_order(server: RedisServer) -> None:
    seen: list[Change] = []
    with (
        opened(server.url) as registry,
        opened(server.url) as writer,
        subscribed(registry, lambda *change: seen.append(change)) as subscription,
    ):
        publish(writer, 0)
        soon(lambda: seen == [("default", "e2e")], "the publish was not announced")
        publish(writer, 1, tenant="acme", name="a.b")
        writer.promote("default", "e2e", VERSIONS[0])  # where it points already: no change
        publish(writer, 1)
        writer.rollback("default", "e2e")
        writer.delete("default", "e2e")
        writer.undelete("default", "e2e")
        own = ("default", "e2e")
        expected = [own, ("acme", "a.b"), own, own, own, own]
        soon(lambda: len(seen) >= len(expected), f"only {seen}")
        assert seen == expected
        assert subscription.live()
        assert subscription.generation == 1


def test_a_change_is_readable_when_it_is_announced(server: RedisServer) -> None:
    read: list[str] = []
    with opened(server.url) as registry, opened(server.url) as writer:
        with subscribed(registry, lambda *change: read.append(registry.inspect(*change).aliases["production"])):
            for step in range(20):
                publish(writer, step % 2) if step < 2 else writer.promote("default", "e2e", VERSIONS[step % 2])
            soon(lambda: len(read) == 20, "announcements are missing")
        assert read[-1] == VERSIONS[1]


def test_a_quiet_subscription_stays_live(server: RedisServer) -> None:
    with opened(server.url) as registry, subscribed(registry, lambda *_: None) as subscription:
        until = time.monotonic() + 1.5
        lapses = 0
        while time.monotonic() < until:
            lapses += not subscription.live()
            time.sleep(0.01)
        assert lapses <= 30  # a busy machine may be late, but silence is no lapse
        assert subscription.live()
        assert subscription.generation <= 2


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_a_server_that_falls_silent_is_noticed_within_a_second(server: RedisServer, fault: str) -> None:
    with opened(server.url) as registry, subscribed(registry, lambda *_: None) as subscription:
        getattr(server, fault)()
        began = time.monotonic()
        soon(lambda: not subscription.live(), "still live")
        assert time.monotonic() - began < SOON_S
        time.sleep(0.7)
        assert not subscription.live()
        server.resume() if fault == "pause" else server.start()
        soon(lambda: subscription.live() and subscription.generation >= 2, "not live again", 20)


def test_a_cut_connection_is_a_new_generation_and_what_comes_after_is_heard(server: RedisServer) -> None:
    seen: list[Change] = []
    with (
        Front(server.server_port) as front,
        opened(f"redis://127.0.0.1:{front.port}") as registry,
        opened(server.url) as writer,
        subscribed(registry, lambda *change: seen.append(change)) as subscription,
    ):
        for generation in (2, 3):
            front.cut()
            soon(lambda: subscription.generation == generation and subscription.live(), "no new connection")  # noqa: B023
            publish(writer, generation - 2, name=f"task-{generation}")
            soon(lambda: ("default", f"task-{generation}") in seen, "nothing heard after it")  # noqa: B023


class Reader:
    """Believes what it read while the subscription is live, of the same generation, and nothing was announced since."""

    def __init__(self, registry: RedisRegistry) -> None:
        self._registry = registry
        self._changes = 0
        self._known: tuple[str, int, int] | None = None

    def forget(self, tenant: str, name: str) -> None:
        self._changes += 1

    def version(self, subscription: Subscription) -> str | None:
        changes, generation = self._changes, subscription.generation
        if self._known and self._known[1:] == (changes, generation) and subscription.live():
            return self._known[0]
        try:
            version = self._registry.inspect("default", "e2e").aliases["production"]
        except RegistryUnavailable:
            return None  # cut in the middle
        self._known = (version, changes, generation)
        return None  # what was believed is asked for, not what was just read


def test_whoever_reads_when_told_is_not_left_with_what_is_outdated_by_a_network_that_breaks(
    server: RedisServer,
) -> None:
    with (
        Front(server.server_port) as front,
        opened(f"redis://127.0.0.1:{front.port}") as registry,
        opened(server.url) as writer,
    ):
        reader = Reader(registry)
        with subscribed(registry, reader.forget) as subscription:
            publish(writer, 0, 1)
            for step in range(12):
                version = VERSIONS[step % 2]
                if step % 3 == 2:
                    front.cut()
                writer.promote("default", "e2e", version)
                soon(lambda: reader.version(subscription) == version, f"step {step}: still the one before")  # noqa: B023


@pytest.mark.parametrize("delay_s", [0.0, 0.2])
def test_what_was_changed_before_it_was_heard_has_been_announced(server: RedisServer, delay_s: float) -> None:
    """``heard_at`` is when the server was asked, not when its answer came: a slow network brings it late."""
    seen: list[Change] = []
    with (
        Front(server.server_port) as front,
        opened(f"redis://127.0.0.1:{front.port}") as registry,
        opened(server.url) as writer,
        subscribed(registry, lambda *change: seen.append(change)) as subscription,
    ):
        front.delay_s = delay_s
        for step in range(3):
            name = f"task-{step}"
            publish(writer, 0, name=name)
            published = time.monotonic()
            while subscription.heard_at < published:
                assert time.monotonic() - published < 20
                time.sleep(0.001)
            assert ("default", name) in seen
            assert time.monotonic() - published >= delay_s * 0.9


def test_a_listener_that_fails_does_not_end_the_listening(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Change] = []

    def fail_once(*change: str) -> None:
        seen.append((change[0], change[1]))
        if len(seen) == 1:
            raise ValueError("the listener's own")

    with (
        caplog.at_level(logging.ERROR, "prefixd.registry"),
        opened(server.url) as registry,
        subscribed(registry, fail_once) as subscription,
    ):
        publish(registry, 0)
        soon(lambda: subscription.generation == 2 and subscription.live(), "listening ended")
        publish(registry, 1)
        soon(lambda: len(seen) == 2, "nothing heard after it")
    assert "the listener's own" in caplog.text


def test_closing_ends_the_thread_and_the_connection(server: RedisServer) -> None:
    with opened(server.url) as registry, server.client() as client:
        before = {thread.ident for thread in threading.enumerate()}
        with subscribed(registry, lambda *_: None):
            assert len({thread.ident for thread in threading.enumerate()} - before) == 1
            assert len(client.pubsub_channels()) == 1
        assert {thread.ident for thread in threading.enumerate()} <= before
        soon(lambda: client.pubsub_channels() == [], "still subscribed")


def test_closing_beside_a_server_that_does_not_answer_is_bounded(server: RedisServer) -> None:
    with opened(f"{server.url}?timeout_s=0.2") as registry, subscribed(registry, lambda *_: None) as subscription:
        server.pause()
        time.sleep(0.8)
        began = time.monotonic()
        subscription.close()
        assert time.monotonic() - began < 2
        server.resume()


def test_a_subscription_to_a_server_that_is_not_there_yet_comes_alive(server: RedisServer) -> None:
    with opened(server.url) as registry:
        server.stop()
        subscription = registry.subscribe(lambda *_: None)
        assert subscription is not None
        with closing(subscription):
            time.sleep(0.2)
            assert not subscription.live()
            assert subscription.generation == 0
            server.start()
            soon(subscription.live, "never live", 20)
            assert subscription.generation == 1


@pytest.mark.slow
def test_a_failover_under_sentinels_is_a_new_generation() -> None:
    seen: list[Change] = []
    with RedisSentinel() as sentinel, opened(sentinel.url) as registry:
        publish(registry, 0)
        with subscribed(registry, lambda *change: seen.append(change)) as subscription:
            sentinel.wait_replica()
            sentinel.failover()
            soon(lambda: subscription.generation >= 2 and subscription.live(), "no new connection", 30)
            publish(registry, 1)
            soon(lambda: seen == [("default", "e2e")], "not announced by the new master")


@pytest.mark.slow
def test_a_cluster_is_polled() -> None:
    with RedisCluster() as cluster, opened(cluster.url) as registry:
        assert registry.subscribe(lambda *_: None) is None
        publish(registry, 0)  # and announces nothing
