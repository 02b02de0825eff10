"""What every limiter forgets: the counters of keys that are gone, and nothing that still counts."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from prefixes.limiter import memory
from prefixes.limiter.base import Charge, Limiter, Taken, Window
from prefixes.limiter.memory import MemoryLimiter
from prefixes.limiter.windows import Bucket, Count
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.limiter import RedisLimiter
from tests.contract.conftest import Clock

TTL = 600.0
Entries = Callable[[], int]


def charges_of(key: str, amount: int, *windows: Window) -> list[Charge]:
    """Of the tenant, and of one of its keys."""
    return [Charge("tokens", window, 5000, amount, owner) for window in windows for owner in (None, key)]


@pytest.fixture
def entries(limiter: Limiter) -> Entries:
    """How many counters of the tenant there are."""
    if isinstance(limiter, RedisLimiter):
        return lambda: int(limiter._client.hlen(TenantKeys("acme").counters))
    assert isinstance(limiter, MemoryLimiter)
    return lambda: len(limiter._tenants["acme"].counters)


def test_keys_that_came_and_went_leave_nothing(limiter: Limiter, clock: Clock, entries: Entries) -> None:
    """Each key left a counter for each of its limits, for as long as its tenant asked for something."""
    most = 0
    for number in range(3000):
        taken = limiter.take("acme", f"r{number}", charges_of(f"k{number}", 10, Window.MINUTE), TTL)
        assert isinstance(taken, Taken)
        limiter.settle("acme", f"r{number}", {"tokens": 10})
        clock.now += 1
        most = max(most, entries())
    assert most < 150


def test_keys_of_past_days_leave_nothing(limiter: Limiter, clock: Clock, entries: Entries) -> None:
    for day in range(40):
        for number in range(50):
            limiter.take("acme", f"{day}/{number}", charges_of(f"{day}/{number}", 1, Window.DAY, Window.MONTH), TTL)
            limiter.settle("acme", f"{day}/{number}", {"tokens": 1})
        clock.now += 86_400
    assert entries() < 2 * 50 * 31 + 150, "those of a month count until it ends"
    clock.now += 31 * 86_400
    for number in range(4000):
        limiter.take("acme", f"r{number}", charges_of(f"k{number}", 10, Window.MINUTE), TTL)
        limiter.settle("acme", f"r{number}", {"tokens": 10})
        clock.now += 1
    assert entries() < 150


def test_what_is_reserved_is_never_forgotten(limiter: Limiter, clock: Clock) -> None:
    """A bucket that is full again still owes what a reservation uses beyond it, and must not give back twice."""
    limiter.take("acme", "long", charges_of("old", 100, Window.MINUTE), 1e6)
    clock.now += 3600
    for number in range(500):
        limiter.take("acme", f"r{number}", charges_of(f"k{number}", 1, Window.MINUTE), TTL)
        limiter.settle("acme", f"r{number}", {"tokens": 1})
        clock.now += 1
    again = limiter.take("acme", "again", charges_of("old", 5000, Window.MINUTE)[1:], TTL)
    assert isinstance(again, Taken) and again.states[0].used == 5000
    limiter.settle("acme", "long", {"tokens": 0})  # it has refilled long ago
    probe = limiter.take("acme", "probe", charges_of("old", 0, Window.MINUTE)[1:], TTL)
    assert probe.states[0].used == 5000


@pytest.mark.parametrize("seed", range(4))
def test_a_limiter_that_forgets_answers_as_one_that_never_does(
    limiter: Limiter, clock: Clock, entries: Entries, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance, remembering = random.Random(seed), MemoryLimiter(clock)
    if isinstance(limiter, MemoryLimiter):  # as often as can be
        monkeypatch.setattr(memory, "SWEEP_AT", 1)
    remembering.take("acme", "first", [], TTL)
    remembering._tenants["acme"].sweep_at = 10**9
    open_ones: list[str] = []
    clock.now += 11.5 * 3600
    for number in range(1500):
        step = chance.random()
        if step < 0.6:
            key, name = f"k{int(chance.paretovariate(0.5)) % 400}", f"r{number}"
            charges = charges_of(key, chance.randint(0, 900), *chance.sample(list(Window), chance.randint(1, 3)))
            ttl_s = chance.choice([5.0, 300.0, 100_000.0])
            found, wanted = (one.take("acme", name, charges, ttl_s) for one in (limiter, remembering))
            assert type(found) is type(wanted)
            for state, other in zip(found.states, wanted.states, strict=True):
                assert (state.charge, state.used) == (other.charge, other.used)
                assert (state.reset_s, state.wait_s) == pytest.approx((other.reset_s, other.wait_s), abs=1e-6)
            open_ones += [name] * isinstance(found, Taken)
        elif step < 0.8 and open_ones:
            name = open_ones.pop(chance.randrange(len(open_ones)))
            spent = chance.choice([0, chance.randint(0, 900), 2000])
            for one in (limiter, remembering):
                one.settle("acme", name, {"tokens": spent})
        elif step < 0.85:
            for one in (limiter, remembering):
                one.renew("acme", open_ones[-3:], 50_000.0)
        else:
            clock.now += chance.choice([0.0, 0.5, 5.0, 60.0, 3600.0])
    assert entries() < len(remembering._tenants["acme"].counters) - 50


def test_each_new_counter_pays_for_two_looks_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, made = [0], 3000
    for kind in (Bucket, Count):
        is_spent = kind.is_spent

        def counted(self: Bucket | Count, now: float, inner: Callable[..., bool] = is_spent) -> bool:
            looks[0] += 1
            return inner(self, now)

        monkeypatch.setattr(kind, "is_spent", counted)
    for seconds in (0.0, 100.0):  # none is spent, or all are
        clock, looks[0] = Clock(), 0
        limiter = MemoryLimiter(clock)
        for number in range(made):
            limiter.take("acme", f"r{number}", charges_of(f"k{number}", 1, Window.MINUTE)[1:], 50)
            clock.now += seconds
        assert made / 2 < looks[0] <= 2 * made
