"""Who is admitted next where a head does not fit, who gives way, and that all end whatever the tenants do."""

from __future__ import annotations

import queue
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from prefixes.errors import InvalidArtifact
from prefixes.tenancy.limits import Limits
from server.engine.prefixes.entry import LoadStatus
from server.engine.row import Group
from server.engine.scheduling.tenant_queue import PASSES
from server.engine.types import PrefixKey
from tests.support.figures import Figures
from tests.support.scheduling import Machine, Make

A, B = (PrefixKey("owner", name) for name in "ab")


@pytest.fixture
def make(make: Make) -> Make:
    return partial(make, early_end=0.0)


def running(machine: Machine) -> list[str]:
    return [group.request.request_id for group in machine.scheduler.running]


def add(machine: Machine, name: str, caller: str, tokens: int, length: int = 2, **params: Any) -> Group:
    return machine.add(machine.request(name, range(length), caller=caller, max_new_tokens=tokens, **params))


# --- whose turn it is ---


def test_the_tenant_with_the_least_counter_goes_first_and_each_keeps_its_own_order(make: Make) -> None:
    machine = make(60, max_rows=1)
    for index in range(3):
        add(machine, f"a{index}", "a", 4)
    for index in range(3):
        add(machine, f"b{index}", "b", 4)
    machine.run()
    assert list(machine.ended) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_head_that_lacks_rows_lets_so_many_others_pass_and_then_none(make: Make) -> None:
    """Neither does it hold up others at once, nor do they starve it."""
    machine = make(200, max_rows=4, reuse=False)
    for index in range(4):
        add(machine, f"first{index}", "small", 3 + index)
    machine.step()
    add(machine, "wide", "wide", 2, do_sample=True, num_return_sequences=4)
    for index in range(40):
        add(machine, f"small{index}", "small", 5)
    while "wide" not in running(machine):
        machine.step()
    passed = [name for name in [*machine.ended, *running(machine)] if name.startswith("small")]
    assert len(passed) == PASSES
    assert machine.steps <= 6 + 5 * PASSES
    machine.run()
    assert len(machine.ended) == 45


def test_a_head_that_reserves_holds_others_up_no_longer_than_what_runs_takes(make: Make) -> None:
    machine = make(200, max_rows=4, reuse=False)
    longest = 30
    add(machine, "long", "small", longest)
    machine.step()
    add(machine, "wide", "wide", 2, do_sample=True, num_return_sequences=4)
    for index in range(60):
        add(machine, f"small{index}", "small", 2)
    idle, admitted = 0, len(machine.ended) + len(running(machine))
    while "wide" not in running(machine):
        machine.step()
        now = len(machine.ended) + len(running(machine))
        idle, admitted = (idle + 1 if now == admitted else 0), now
    assert idle <= longest
    machine.run()


def test_a_head_that_lacks_blocks_does_not_hold_up_another_tenants_task(make: Make) -> None:
    machine = make(10, reuse=False)
    add(machine, "runs", "c", 12, length=12)
    machine.step()
    add(machine, "large", "a", 1, length=30)
    add(machine, "behind it", "a", 1)
    add(machine, "small", "b", 1)
    machine.step()
    assert "small" in machine.ended
    machine.run()
    assert list(machine.ended) == ["small", "runs", "large", "behind it"]


def test_a_large_head_gets_its_blocks_although_small_ones_of_others_never_stop_coming(make: Make) -> None:
    machine = make(12, reuse=False, max_rows=3)
    for index in range(3):
        add(machine, f"small{index}", "b", 4 + index)
    machine.step()
    add(machine, "large", "a", 1, length=40)
    count = 3
    while "large" not in machine.ended:
        if machine.scheduler.waiting.count("b") < 2:
            add(machine, f"small{count}", "b", 4)
            count += 1
        machine.step()
        assert machine.steps < 100, "starved"
    assert count <= 3 + PASSES + 2
    machine.run()


def test_a_head_whose_prefix_loads_holds_up_nobody(make: Make) -> None:
    machine = make(60, lengths={A: 4, B: 4})
    machine.gates[A] = queue.Queue()
    machine.add(machine.request("loads", [1], A, caller="a", max_new_tokens=1))
    for index in range(3 * PASSES):
        machine.add(machine.request(f"b{index}", [1], B, caller="b", max_new_tokens=1))
    while len(machine.ended) < 3 * PASSES:
        machine.wait()
        machine.step()
    machine.gates[A].put(None)
    machine.run()
    assert machine.ended["loads"] == "finished"


def test_a_head_that_waits_for_claims_lets_others_pass_and_is_not_starved(make: Make) -> None:
    """It waits for the claims on another prefix, which new groups of another tenant renew."""
    machine = make(60, lengths={A: 16, B: 16}, preempted_prefix_bytes=4, reuse=False, max_rows=3)
    machine.add(machine.request("claims", [1], A, caller="a", max_new_tokens=6))
    machine.wait_for(A)
    machine.step()
    machine.add(machine.request("head", [1], B, caller="b", max_new_tokens=2))
    machine.wait_for(B)
    count = 0
    while "head" not in machine.ended:
        if machine.scheduler.waiting.count("a") < 2:
            machine.add(machine.request(f"a{count}", [1], A, caller="a", max_new_tokens=3))
            count += 1
        machine.step()
        assert machine.steps < 100, "starved"
    assert machine.ended["a0"] == "finished", "one that can run has passed"
    assert count <= PASSES + 3
    machine.run()


def test_preempted_groups_of_any_tenant_pass_a_head_that_waits_for_their_claims(make: Make) -> None:
    """Many tenants are before them, and each is kept out by the bound: nobody would ever run."""
    machine = make(60, lengths={A: 16, B: 16}, preempted_prefix_bytes=4, reuse=False)
    claims = machine.add(machine.request("claims", [1], A, caller="z", max_new_tokens=9))
    machine.wait_for(A)
    machine.step()
    for index in range(3 * PASSES):
        machine.add(machine.request(f"b{index}", [1], B, caller=f"t{index}", max_new_tokens=1), at=0.5)
    machine.wait_for(B)
    machine.scheduler.preempt(claims)
    machine.run()
    assert next(iter(machine.ended)) == "claims" and len(machine.ended) == 1 + 3 * PASSES


# --- who gives way ---


def test_a_floods_youngest_gives_way_and_not_the_newcomer_who_was_just_admitted(make: Make) -> None:
    """The newcomer was the youngest of all: the flood's old backlog took from it what its turn had given."""
    machine = make(13, reuse=False, max_rows=8)
    for index in range(3):
        add(machine, f"flood{index}", "flood", 16, length=4)
    machine.step()
    machine.step()
    add(machine, "newcomer", "quiet", 14, length=4)
    machine.run()
    assert machine.preempted and set(machine.preempted) <= {"flood1", "flood2"}
    assert machine.preempted[0] == "flood2"
    assert set(machine.ended.values()) == {"finished"}


def test_the_oldest_group_never_gives_way_although_its_tenant_had_the_most(make: Make) -> None:
    weights = {"much": 1.0, "little": 10.0}
    machine = make(9, reuse=False, weight_of=lambda tenant: weights.get(tenant, 1.0))
    oldest = add(machine, "oldest", "much", 24, length=4)
    machine.step()
    add(machine, "other", "little", 20, length=4)
    machine.step()
    assert machine.scheduler.running[0] is oldest
    assert machine.scheduler.counters.of("much") > machine.scheduler.counters.of("little")
    machine.run()
    assert machine.preempted and set(machine.preempted) == {"other"}


def test_an_older_group_that_comes_in_late_takes_the_place_of_the_oldest_and_all_end(make: Make) -> None:
    """The oldest running group is another when an older one is admitted; only finitely many are older."""
    machine = make(9, reuse=False)
    for age in range(6, 0, -1):
        machine.add(machine.request(f"age{age}", range(4), caller=f"t{age}", max_new_tokens=20), at=float(-age))
        machine.step()
    machine.run(limit=400)
    assert len(machine.ended) == 6


def test_each_request_ends_although_blocks_are_short_and_new_ones_never_stop_coming(make: Make) -> None:
    """The oldest that runs never gives way, so that what runs ends; whoever waits is passed so often and no more."""
    machine = make(16, reuse=False, max_rows=6)
    rng, began, longest = random.Random(0), dict[str, int](), 0
    while machine.steps < 500:
        for tenant in ("flood", "steady", "keys"):
            while machine.scheduler.waiting.count(tenant) < 3:
                name = f"{tenant}{len(began)}"
                began[name] = machine.steps
                params: dict[str, Any] = {"num_beams": 3} if rng.random() < 0.2 else {}
                request = machine.request(
                    name, range(rng.choice([2, 6])), caller=tenant, caller_key=rng.choice("xy"),
                    max_new_tokens=rng.choice([4, 16]), **params,
                )  # fmt: skip
                machine.add(request)
        ended = len(machine.ended)
        machine.step()
        longest = max([longest, *(machine.steps - began[name] for name in list(machine.ended)[ended:])])
    assert len(machine.preempted) > 20
    waits = [machine.steps - began[name] for name in began if name not in machine.ended]
    assert max(longest, *waits) < 250
    machine.run()


# --- random loads ---


class Watched:
    """A machine that many tenants use at random, and what must hold after each step."""

    def __init__(self, make: Make, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.tenants = ["flood", "flood", "flood", "heavy", "light", "rare"]
        weights = {"heavy": rng.choice([2.0, 5.0]), "light": 0.5}
        keys = [PrefixKey(rng.choice(["one", "two"]), f"v{index}") for index in range(4)]
        self.machine = make(
            rng.choice([20, 24, 30]), seed=seed, lengths={key: rng.choice([1, 4, 5, 9]) for key in keys},
            reuse=rng.random() < 0.5, max_rows=8, max_step_tokens=rng.choice([8, 30]),
            max_prefix_bytes=rng.choice([None, 4]), preempted_prefix_bytes=rng.choice([None, 4]),
            units=rng.choice([0, 0, 3]), weight_of=lambda tenant: weights.get(tenant, 1.0), limits_of=self.limits_of,
            early_end=0.02,
        )  # fmt: skip
        self.rows = {"flood": rng.choice([4, 6]), "flood 0": 4, "heavy": 5}
        self.machine.failures[rng.choice(keys)] = InvalidArtifact("broken")
        self.groups: list[Group] = []
        self.forced = 0

    def limits_of(self, tenant: str, key: str | None) -> Limits:
        return Limits(rows_running=self.rows.get(tenant if key is None else key))

    def add(self) -> None:
        params: dict[str, Any] = {"max_new_tokens": self.rng.choice([1, 5, 17, 30])}
        if (kind := self.rng.choice(["greedy", "greedy", "sample", "beams"])) == "sample":
            params |= {"do_sample": True, "num_return_sequences": self.rng.choice([1, 2, 4])}
        elif kind == "beams":
            params |= {"num_beams": self.rng.choice([2, 3])}
        prompt = [self.rng.randrange(3) for _ in range(self.rng.choice([1, 4, 5, 9]))]
        key = self.rng.choice([None, *self.machine.prefixes])
        caller = self.rng.choice(self.tenants)
        request = self.machine.request(
            f"r{len(self.groups)}", prompt, key, caller=caller, **params,
            caller_key=self.rng.choice([None, f"{caller} 0", f"{caller} 1"]),
        )  # fmt: skip
        needed, capacity = self.machine.fits_alone(request)
        if needed <= capacity:
            self.groups.append(self.machine.add(request, at=float(len(self.groups))))

    def disturb(self) -> None:
        machine, rng = self.machine, self.rng
        if machine.scheduler.running and rng.random() < 0.1:
            self.forced += 1
            machine.scheduler.preempt(rng.choice(machine.scheduler.running))
        alive = [group for group in self.groups if group.request.request_id not in machine.ended]
        if alive and rng.random() < 0.05:
            machine.abort(rng.choice(alive))

    def step(self) -> None:
        machine = self.machine
        machine.wait()
        self.check_order()
        turns = [turn.group.request.prefix for turn in machine.scheduler._entrance.turns()]
        could_run = any(key is None or machine.store.status(key) is not LoadStatus.LOADING for key in turns)
        before, oldest = len(machine.preempted), next(iter(machine.scheduler.running), None)
        plan = machine.step()
        assert plan.rows or plan.encode or plan.failed or not could_run, "idle although somebody could run"
        if oldest and oldest.request.request_id in machine.preempted[before:]:
            assert plan.groups[0].submitted_at < oldest.submitted_at, "the oldest gave way"
        rows = Counter[str]()
        for group in machine.scheduler.running:
            of_group = dict.fromkeys((group.request.caller, group.request.key or ""), group.request.params.rows)
            rows.update(of_group)
        assert all(rows[name] <= most for name, most in self.rows.items()), "above a limit of rows"

    def check_order(self) -> None:
        """The order that is kept is the one that sorting would give."""
        waiting, counters = self.machine.scheduler.waiting, self.machine.scheduler.counters
        ready = {tenant: queue for tenant, queue in waiting._queues.items() if queue}
        order = sorted(ready, key=lambda tenant: (counters.of(tenant), ready[tenant].arrival))
        assert list(waiting.in_turn()) == [ready[tenant] for tenant in order]


@pytest.mark.parametrize("first_seed", range(0, 40, 10))
def test_all_end_and_nothing_is_idle_under_random_loads_of_many_tenants(
    make: Make, first_seed: int, record_property: Callable[[str, object], None]
) -> None:
    """Beams, samples, keys, limits of rows, prefixes that come, go and fail, few blocks, preemption, aborts; the
    machine checks every step that the ledger is whole and that contexts stay apart."""
    requests = chosen = 0
    for seed in range(first_seed, first_seed + 10):
        watched = Watched(make, seed)
        machine, left = watched.machine, 40
        while left or machine.scheduler.waiting or machine.scheduler.running:
            while left and (watched.rng.random() < 0.4 or not (machine.scheduler.waiting or machine.scheduler.running)):
                watched.add()
                left -= 1
            watched.disturb()
            if machine.scheduler.waiting or machine.scheduler.running:
                watched.step()
            assert machine.steps < 3000, "no end in sight"
        machine.run()
        assert machine.ended.keys() == {group.request.request_id for group in watched.groups}
        requests += len(watched.groups)
        chosen += len(machine.preempted) - watched.forced
    note = f"{requests} requests of random tenants, {chosen} preempted for lack of blocks"
    record_property(*Figures("fairness", cases=requests, notes=[note]).as_property())
    assert chosen
