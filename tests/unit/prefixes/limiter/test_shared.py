"""A limiter that replicas share, and what they do while it is away: real Redis servers that stop and start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.limiter.base import Charge, Limiter, Refused, Taken, Window
from prefixes.limiter.memory import MemoryLimiter
from prefixes.limiter.shared import EXPIRES_S, SharedLimiter
from prefixes.registry.limiter import open_limiter
from prefixes.registry.redis.limiter import RedisLimiter
from prefixes.registry.redis.url import parse_redis_url
from tests.support.redis_server import RedisServer, wait_until

TTL = 600.0


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(append_only=True) as server:
        yield server


@pytest.fixture
def replicas(server: RedisServer) -> Iterator[list[SharedLimiter]]:
    """Three that know of each other. Nothing looks by itself."""
    server.flush()
    target = parse_redis_url(f"{server.url}?timeout_s=20")
    with ExitStack() as stack:
        made = [stack.enter_context(closing(SharedLimiter(RedisLimiter(target, "server")))) for _ in range(3)]
        for one in (*made, *made):
            one.look()
        assert [one.replicas for one in made] == [3, 3, 3]
        yield made
        if not server.running:
            server.start()


def charge(amount: int = 1, limit: int = 60, window: Window = Window.DAY) -> Charge:
    return Charge("tokens", window, limit, amount)


def allowed(limiter: Limiter, name: str, amount: int = 1, limit: int = 60) -> int:
    """How many it lets in before it refuses one."""
    for number in range(1000):
        if isinstance(limiter.take("acme", f"{name}{number}", [charge(amount, limit)], TTL), Refused):
            return number
    raise AssertionError("it refuses nothing")


def test_replicas_share_a_limit_exactly(replicas: list[SharedLimiter]) -> None:
    answers = [replicas[number % 3].take("acme", f"r{number}", [charge()], TTL) for number in range(90)]
    assert [isinstance(answer, Taken) for answer in answers] == [True] * 60 + [False] * 30


def test_while_it_is_away_each_allows_its_share(server: RedisServer, replicas: list[SharedLimiter]) -> None:
    server.stop()
    assert [allowed(one, "r") for one in replicas] == [20, 20, 20]
    assert not any(one.up for one in replicas)


def test_a_request_above_the_share_is_let_in_alone(server: RedisServer, replicas: list[SharedLimiter]) -> None:
    server.stop()
    assert allowed(replicas[0], "large", amount=50) == 1
    assert allowed(replicas[1], "small", limit=1) == 1
    assert isinstance(replicas[2].take("acme", "r", [charge(61)], TTL), Refused)


def test_it_is_used_again_and_gets_what_was_settled_meanwhile(
    server: RedisServer, replicas: list[SharedLimiter]
) -> None:
    first, second, _ = replicas
    first.take("acme", "before", [charge(50)], TTL)
    server.stop()
    assert isinstance(second.take("acme", "meanwhile", [charge(20)], TTL), Taken)
    first.settle("acme", "before", {"tokens": 10})
    second.settle("acme", "meanwhile", {"tokens": 20})
    server.start()
    assert isinstance(first.take("acme", "own", [charge(20)], TTL), Taken)
    first.look()
    second.look()
    answer = second.take("acme", "after", [charge(1)], TTL)
    assert first.up and answer.states[0].used == 11


def test_a_take_whose_answer_was_lost_is_settled_there_too(replicas: list[SharedLimiter]) -> None:
    lost = Counted(replicas[0]._remote)
    limiter = SharedLimiter(lost)
    lost.loses_answers = True
    assert isinstance(limiter.take("acme", "r", [charge(50)], TTL), Taken)
    lost.loses_answers = False
    limiter.settle("acme", "r", {"tokens": 7})
    limiter.look()
    assert replicas[1].take("acme", "s", [charge(1)], TTL).states[0].used == 8


def test_nobody_waits_for_one_that_is_away() -> None:
    remote = Counted(MemoryLimiter())
    limiter = SharedLimiter(remote)
    remote.away = True
    for number in range(5):
        assert isinstance(limiter.take("acme", f"r{number}", [charge()], TTL), Taken)
        limiter.settle("acme", f"r{number}", {"tokens": 1})
        limiter.renew("acme", [f"r{number}"], TTL)
    assert remote.calls == 1
    remote.away = False
    limiter.look()
    assert remote.calls == 1 + 1 + 5  # the announcement, and what was settled
    limiter.take("acme", "r", [charge()], TTL)
    assert remote.calls == 8


def test_one_that_is_just_back_does_not_make_a_replica_think_it_is_alone(
    server: RedisServer, replicas: list[SharedLimiter]
) -> None:
    server.stop()
    replicas[0].look()
    server.start()
    server.flush()
    replicas[0].look()
    assert (replicas[0].up, replicas[0].replicas) == (True, 3)


def test_a_full_redis_takes_no_reservation_and_every_settlement(
    server: RedisServer, replicas: list[SharedLimiter]
) -> None:
    first = replicas[0]
    first.take("acme", "before", [charge(50)], TTL)
    with server.client() as client:
        client.config_set("maxmemory", 1)
        try:
            assert allowed(first, "r") == 20
            first.look()
            assert first.up
            first.settle("acme", "before", {"tokens": 10})
            assert first.up
        finally:
            client.config_set("maxmemory", 0)
    assert first.take("acme", "after", [charge(1)], TTL).states[0].used == 11


def test_a_replica_that_is_gone_or_has_left_does_not_count(server: RedisServer) -> None:
    server.flush()
    now = 1_800_000_000.0
    with closing(RedisLimiter(parse_redis_url(server.url), "server", lambda: now)) as limiter:
        assert [limiter.announce(name, EXPIRES_S) for name in ("a", "b", "b", "c")] == [1, 2, 2, 3]
        assert limiter.announce("c", 0) == 2
        now += EXPIRES_S - 1
        assert limiter.announce("a", EXPIRES_S) == 2
        now += 1
        assert limiter.announce("a", EXPIRES_S) == 1
        with closing(RedisLimiter(parse_redis_url(server.url), "trainer", lambda: now)) as other:
            assert other.announce("d", EXPIRES_S) == 1


def test_an_opened_one_finds_others_and_the_return_of_redis_by_itself(server: RedisServer) -> None:
    server.flush()
    with ExitStack() as stack:
        unread: Any = None  # Redis has its own counters
        made = [stack.enter_context(closing(open_limiter(server.url, unread, service="server"))) for _ in range(2)]
        limiters = [one for one in made if isinstance(one, SharedLimiter)]
        assert len(limiters) == 2 and all(one.remote for one in limiters)
        wait_until(lambda: [one.replicas for one in limiters] == [2, 2], lambda: "they do not find each other")
        server.stop()
        wait_until(lambda: not any(one.up for one in limiters), lambda: "the outage is not found")
        server.start()
        wait_until(lambda: all(one.up for one in limiters), lambda: "the return is not found")


class Counted:
    """A shared limiter that can be away, or lose its answers."""

    remote = True

    def __init__(self, inner: Limiter) -> None:
        self._inner, self.calls, self.away, self.loses_answers = inner, 0, False, False

    def _call(self) -> None:
        self.calls += 1
        if self.away:
            raise RegistryUnavailable("away")

    def take(self, tenant: str, reservation_id: str, charges: Sequence[Charge], ttl_s: float) -> Taken | Refused:
        self._call()
        answer = self._inner.take(tenant, reservation_id, charges, ttl_s)
        if self.loses_answers:
            raise RegistryUnavailable("lost")
        return answer

    def settle(self, tenant: str, reservation_id: str, used: Mapping[str, int]) -> None:
        self._call()
        self._inner.settle(tenant, reservation_id, used)

    def renew(self, tenant: str, reservation_ids: Sequence[str], ttl_s: float) -> None:
        self._call()
        self._inner.renew(tenant, reservation_ids, ttl_s)

    def announce(self, replica: str, expires_s: float) -> int:
        self._call()
        return 1

    def close(self) -> None:
        self._inner.close()
