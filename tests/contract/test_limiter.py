"""What every limiter promises: one in memory, and those in Redis. Each test owns the clock."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from prefixes.limiter.base import Charge, Limiter, Refused, Taken, Window
from tests.contract.conftest import NOON, Clock

TTL = 600.0


def requests(limit: int, key: str | None = None) -> Charge:
    return Charge("requests", Window.MINUTE, limit, 1, key)


def tokens(window: Window, limit: int, amount: int, key: str | None = None) -> Charge:
    return Charge("tokens", window, limit, amount, key)


def used(limiter: Limiter, *charges: Charge, tenant: str = "acme") -> list[int]:
    """What counts against each charge's limit now; nothing is taken."""
    probe = [Charge(one.counter, one.window, one.limit, 0, one.key) for one in charges]
    return [state.used for state in limiter.take(tenant, "probe", probe, 1e-9).states]


def test_all_charges_are_taken_or_none(limiter: Limiter) -> None:
    day, minute, own = tokens(Window.DAY, 100, 60), tokens(Window.MINUTE, 1000, 60), tokens(Window.DAY, 50, 60, "k1")
    refused = limiter.take("acme", "r1", [minute, day, own], TTL)
    assert isinstance(refused, Refused) and refused.by.charge == own and own.is_impossible
    assert used(limiter, minute, day, own) == [0, 0, 0]
    assert isinstance(limiter.take("acme", "r1", [minute, day], TTL), Taken)
    refused = limiter.take("acme", "r2", [minute, day], TTL)
    assert isinstance(refused, Refused) and refused.by.charge == day
    assert (refused.by.used, refused.by.remaining, refused.by.wait_s) == (60, 40, 12 * 3600)
    assert used(limiter, minute, day) == [60, 60]


def test_tenants_and_keys_have_counters_of_their_own(limiter: Limiter) -> None:
    for tenant, key in (("acme", "k1"), ("acme", "k2"), ("globex", "k3")):
        charges = [tokens(Window.DAY, 100, 40), tokens(Window.DAY, 40, 40, key)]
        assert isinstance(limiter.take(tenant, f"r-{key}", charges, TTL), Taken)
    assert used(limiter, tokens(Window.DAY, 100, 0), tokens(Window.DAY, 40, 0, "k1")) == [80, 40]
    assert used(limiter, tokens(Window.DAY, 100, 0), tokens(Window.DAY, 40, 0, "k3"), tenant="globex") == [40, 40]


def test_a_bucket_refills_all_the_time(limiter: Limiter, clock: Clock) -> None:
    for number in range(60):
        taken = limiter.take("acme", f"r{number}", [requests(60)], TTL)
        assert isinstance(taken, Taken) and taken.states[0].remaining == 59 - number
        assert taken.states[0].reset_s == pytest.approx(number + 1)
    refused = limiter.take("acme", "one more", [requests(60)], TTL)
    assert isinstance(refused, Refused) and refused.by.wait_s == pytest.approx(1.0)
    clock.now += refused.by.wait_s
    taken = limiter.take("acme", "one more", [requests(60)], TTL)
    assert isinstance(taken, Taken) and taken.states[0].remaining == 0
    clock.now += 30
    assert used(limiter, requests(60)) == [30]
    clock.now += 1000
    assert used(limiter, requests(60)) == [0]


@pytest.mark.parametrize(
    ("window", "at", "end"),
    [
        (Window.DAY, "2026-11-28T23:59:59", "2026-11-29"), (Window.DAY, "2026-12-31T00:00:00", "2027-01-01"),
        (Window.MONTH, "2026-11-28T12:00:00", "2026-12-01"), (Window.MONTH, "2026-12-31T23:59:59", "2027-01-01"),
        (Window.MONTH, "2028-02-29T12:00:00", "2028-03-01"), (Window.MONTH, "2027-02-28T12:00:00", "2027-03-01"),
        (Window.MONTH, "2100-02-28T23:00:00", "2100-03-01"), (Window.MONTH, "2027-01-01T00:00:00", "2027-02-01"),
    ],
)  # fmt: skip
def test_days_and_months_are_those_of_utc(limiter: Limiter, clock: Clock, window: Window, at: str, end: str) -> None:
    clock.now = datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp()
    ends_at = datetime.fromisoformat(end).replace(tzinfo=UTC).timestamp()
    charge = tokens(window, 10, 10)
    assert isinstance(limiter.take("acme", "r1", [charge], 40 * 86_400), Taken)
    refused = limiter.take("acme", "r2", [charge], TTL)
    assert isinstance(refused, Refused) and refused.by.wait_s == refused.by.reset_s == ends_at - clock.now
    clock.now = ends_at - 0.5
    assert isinstance(limiter.take("acme", "r2", [charge], TTL), Refused)
    clock.now = ends_at
    assert isinstance(limiter.take("acme", "r3", [charge], TTL), Taken)


def test_a_settlement_gives_back_the_difference_once(limiter: Limiter) -> None:
    charges = [requests(10), tokens(Window.MINUTE, 1000, 500), tokens(Window.DAY, 1000, 500)]
    limiter.take("acme", "r1", charges, TTL)
    limiter.settle("acme", "r1", {"tokens": 120})
    assert used(limiter, *charges) == [1, 120, 120]
    limiter.settle("acme", "r1", {"tokens": 0})
    limiter.settle("acme", "never taken", {"tokens": 0})
    assert used(limiter, *charges) == [1, 120, 120]


def test_a_settlement_takes_what_was_used_beyond(limiter: Limiter) -> None:
    charges = [tokens(Window.MINUTE, 100, 90), tokens(Window.DAY, 100, 90)]
    limiter.take("acme", "r1", charges, TTL)
    limiter.settle("acme", "r1", {"tokens": 130})
    assert used(limiter, *charges) == [130, 130]
    refused = limiter.take("acme", "r2", [tokens(Window.DAY, 100, 1)], TTL)
    assert isinstance(refused, Refused) and refused.by.remaining == 0


def test_a_reservation_of_a_dead_replica_expires_and_gives_back(limiter: Limiter, clock: Clock) -> None:
    charges = [tokens(Window.DAY, 100, 100)]
    limiter.take("acme", "dead", charges, 60)
    clock.now += 59
    assert isinstance(limiter.take("acme", "r2", charges, 60), Refused)
    clock.now += 1
    assert isinstance(limiter.take("acme", "r2", charges, 60), Taken)
    limiter.settle("acme", "dead", {"tokens": 0})
    assert used(limiter, *charges) == [100]


def test_a_settlement_after_the_expiry_changes_nothing(limiter: Limiter, clock: Clock) -> None:
    charges = [tokens(Window.DAY, 100, 80)]
    limiter.take("acme", "late", charges, 60)
    clock.now += 60
    limiter.settle("acme", "late", {"tokens": 70})
    assert used(limiter, *charges) == [0]


def test_a_renewed_reservation_lives_on_and_a_settled_one_does_not(limiter: Limiter, clock: Clock) -> None:
    charge = tokens(Window.DAY, 100, 40)
    for name in ("r1", "r2"):
        limiter.take("acme", name, [charge], 60)
    limiter.settle("acme", "r2", {"tokens": 10})
    for _ in range(3):
        clock.now += 59
        limiter.renew("acme", ["r1", "r2", "unknown"], 60)
        assert used(limiter, charge) == [50]
    clock.now += 60
    limiter.renew("acme", ["r1"], 60)
    assert used(limiter, charge) == [10]


def test_a_repeated_take_takes_nothing_more(limiter: Limiter) -> None:
    charge = tokens(Window.DAY, 100, 80)
    first = limiter.take("acme", "r1", [charge], TTL)
    assert limiter.take("acme", "r1", [charge], TTL) == first and isinstance(first, Taken)


def test_a_day_s_use_stays_with_the_day_it_was_taken_on(limiter: Limiter, clock: Clock) -> None:
    clock.now += 12 * 3600 - 1
    limiter.take("acme", "r1", [tokens(Window.DAY, 100, 80)], TTL)
    clock.now += 2
    limiter.take("acme", "r2", [tokens(Window.DAY, 100, 30)], TTL)
    limiter.settle("acme", "r1", {"tokens": 10})
    assert used(limiter, tokens(Window.DAY, 100, 0)) == [30]


def test_a_bucket_gives_nothing_twice(limiter: Limiter, clock: Clock) -> None:
    """A's tokens have refilled by themselves. To give them back as well would let B and C take twice the limit at once.
    """
    charge = tokens(Window.MINUTE, 600, 600)
    limiter.take("acme", "a", [charge], TTL)
    clock.now += 60
    assert isinstance(limiter.take("acme", "b", [charge], TTL), Taken)
    limiter.settle("acme", "a", {"tokens": 0})
    assert used(limiter, charge) == [600]


def test_a_full_bucket_gives_back_what_waits_behind_others(limiter: Limiter, clock: Clock) -> None:
    """Refill reaches what was taken first, so that the later half is given back in full, however long ago it was."""
    charge = tokens(Window.MINUTE, 600, 300)
    limiter.take("acme", "a", [charge], TTL)
    limiter.take("acme", "b", [charge], TTL)
    clock.now += 30
    assert used(limiter, charge) == [300]
    limiter.settle("acme", "b", {"tokens": 50})
    assert used(limiter, charge) == [50]


def test_another_limit_holds_from_the_next_take_on(limiter: Limiter, clock: Clock) -> None:
    limiter.take("acme", "r1", [tokens(Window.MINUTE, 600, 600), tokens(Window.DAY, 600, 600)], TTL)
    lower = [tokens(Window.MINUTE, 60, 1), tokens(Window.DAY, 60, 1)]
    assert isinstance(limiter.take("acme", "r2", lower, TTL), Refused)
    taken = limiter.take("acme", "r2", [tokens(Window.MINUTE, 1200, 1), tokens(Window.DAY, 1200, 1)], TTL)
    assert isinstance(taken, Taken) and [state.used for state in taken.states] == [601, 601]
    assert isinstance(limiter.take("acme", "r3", [tokens(Window.DAY, 0, 1)], TTL), Refused)


def test_takers_at_the_same_time_get_the_limit_exactly(limiter: Limiter) -> None:
    charges = [requests(1000), tokens(Window.DAY, 100, 3), tokens(Window.MONTH, 1000, 3, "k1")]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: limiter.take("acme", f"r{number}", charges, TTL), range(60)))
    assert sum(isinstance(answer, Taken) for answer in answers) == 33
    assert used(limiter, *charges) == [33, 99, 99]


# --- random interleavings against a plain model ---


@dataclass
class Model:
    """Counts plainly: a day is a sum, a minute the queue of what has not refilled, the first taken first.

    ``taken`` is what each reservation took and when; of a settled one, what it used.
    """

    limits: dict[tuple[str | None, Window], int]
    days: dict[tuple[str | None, Window, int], int] = field(default_factory=lambda: defaultdict(int))
    queues: dict[str | None, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    open: dict[int, tuple[float, str, int]] = field(default_factory=dict)  # number -> when, key, amount
    log: list[tuple[float, str, int]] = field(default_factory=list)
    now: float = NOON

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for key, queue in self.queues.items():
            left = seconds * self.limits[key, Window.MINUTE] / 60
            while queue and left > 0:
                step = min(left, queue[0][1])
                queue[0][1] -= step
                left -= step
                if queue[0][1] <= 0:
                    queue.pop(0)

    def charges(self, key: str, amount: int) -> list[Charge]:
        return [
            tokens(window, limit, amount, owner)
            for (owner, window), limit in self.limits.items()
            if owner in (None, key)
        ]

    def level(self, charge: Charge) -> float:
        if charge.window is Window.MINUTE:
            return sum(left for _, left in self.queues[charge.key])
        return self.days[charge.key, charge.window, period(charge.window, self.now)]

    def take(self, number: int, key: str, amount: int) -> None:
        self.open[number] = (self.now, key, amount)
        for charge in self.charges(key, amount):
            if charge.window is Window.MINUTE:
                self.queues[charge.key].append([number, amount])
            else:
                self.days[charge.key, charge.window, period(charge.window, self.now)] += amount

    def settle(self, number: int, spent: int) -> None:
        at, key, amount = self.open.pop(number)
        self.log.append((at, key, spent))
        for charge in self.charges(key, amount):
            if charge.window is Window.MINUTE:
                for entry in self.queues[charge.key]:
                    if entry[0] == number:
                        entry[1] = max(0.0, entry[1] - (amount - spent))
            else:
                self.days[charge.key, charge.window, period(charge.window, at)] -= amount - spent


def period(window: Window, now: float) -> int:
    at = datetime.fromtimestamp(now, UTC)
    return at.toordinal() if window is Window.DAY else at.year * 12 + at.month


@pytest.mark.parametrize("seed", range(6))
def test_no_limit_is_ever_exceeded_whatever_the_order(limiter: Limiter, clock: Clock, seed: int) -> None:
    chance = random.Random(seed)
    model = Model({
        (None, Window.MINUTE): 600, (None, Window.DAY): 6000, (None, Window.MONTH): 9000,
        ("k1", Window.MINUTE): 400, ("k1", Window.DAY): 4000, ("k2", Window.MONTH): 5000,
    })  # fmt: skip
    clock.now = model.now = datetime(2026, 11, 29, 23, 40, tzinfo=UTC).timestamp()
    ttl, outcomes = 300.0, {"Taken": 0, "Refused": 0}
    for number in range(400):
        for expired in [name for name, (at, _, _) in model.open.items() if at + ttl <= clock.now]:
            model.settle(expired, 0)
        step = chance.random()
        if step < 0.55:
            key, amount = chance.choice(["k1", "k2"]), chance.randint(1, 200)
            charges = model.charges(key, amount)
            answer = limiter.take("acme", f"r{number}", charges, ttl)
            fits = {charge: model.level(charge) + amount <= charge.limit + 1e-3 for charge in charges}
            days = {charge: fit for charge, fit in fits.items() if charge.window is not Window.MINUTE}
            if isinstance(answer, Taken):
                assert all(fits.values())
                model.take(number, key, amount)
            else:
                refused = [state.charge for state in answer.states if state.wait_s]
                assert {charge for charge in refused if charge in days} == {c for c, fit in days.items() if not fit}
                assert all((state.wait_s > 0) == (state.remaining < amount) for state in answer.states)
            for state in answer.states:
                level = model.level(state.charge)
                assert state.used >= level - 1e-3
                assert state.charge.window is Window.MINUTE or state.used == level
            outcomes[type(answer).__name__] += 1
        elif step < 0.8 and model.open:
            name = chance.choice(list(model.open))
            spent = chance.randint(0, model.open[name][2])
            limiter.settle("acme", f"r{name}", {"tokens": spent})
            model.settle(name, spent)
        else:
            seconds = chance.choice([0.0, 0.5, 3.0, 20.0, 120.0])
            clock.now += seconds
            model.advance(seconds)
    assert min(outcomes["Taken"], outcomes["Refused"]) > 20
    for name in list(model.open):
        spent = chance.randint(0, model.open[name][2])
        late = model.open[name][0] + ttl <= clock.now
        limiter.settle("acme", f"r{name}", {"tokens": spent})
        model.settle(name, 0 if late else spent)
    for (whose, window), limit in model.limits.items():
        mine = sorted((at, spent) for at, owner, spent in model.log if whose in (None, owner))
        if window is Window.MINUTE:
            for first, last in itertools.combinations_with_replacement(range(len(mine)), 2):
                spent = sum(amount for _, amount in mine[first : last + 1])
                assert spent <= limit + limit / 60 * (mine[last][0] - mine[first][0]) + 1e-3
        else:
            by_period: dict[int, int] = defaultdict(int)
            for at, spent in mine:
                by_period[period(window, at)] += spent
            assert max(by_period.values()) <= limit
            assert used(limiter, tokens(window, limit, 0, whose)) == [by_period[period(window, clock.now)]]
    clock.now += 60
    assert used(limiter, tokens(Window.MINUTE, 600, 0)) == [0]


@pytest.mark.parametrize("seed", range(3))
def test_once_all_is_settled_at_one_moment_counters_are_what_was_used(limiter: Limiter, seed: int) -> None:
    chance = random.Random(seed)
    charges = [tokens(window, 10_000, 0, key) for window in Window for key in (None, "k1")]
    open_ones, total = dict[int, int](), 0
    for number in range(100):
        amount = chance.randint(1, 100)
        limiter.take("acme", f"r{number}", [Charge(c.counter, c.window, c.limit, amount, c.key) for c in charges], TTL)
        open_ones[number] = amount
        if chance.random() < 0.5:
            name = chance.choice(list(open_ones))
            spent = chance.randint(0, open_ones.pop(name))
            limiter.settle("acme", f"r{name}", {"tokens": spent})
            total += spent
    for name, amount in open_ones.items():
        limiter.settle("acme", f"r{name}", {"tokens": amount})
        total += amount
    assert used(limiter, *charges) == [total] * len(charges)
