"""Limits of rows that run, of tenants and of keys: kept in every step, and nobody else waits because of them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from prefixes.errors import InvalidParameter
from prefixes.tenancy.limits import NO_LIMITS, Limits
from server.engine.row import Group
from server.engine.scheduling.admission import Admission
from server.engine.scheduling.tenant_queue import PASSES
from tests.support.prefixes import make_backbone_spec
from tests.support.scheduling import Machine, Make


class Set:
    """Limits of rows by tenant, and by tenant and key."""

    def __init__(self, tenants: dict[str, int] | None = None, keys: dict[str, int] | None = None) -> None:
        self.tenants, self.keys = tenants or {}, keys or {}

    def __call__(self, tenant: str, key: str | None) -> Limits:
        most = self.tenants.get(tenant) if key is None else self.keys.get(key)
        return NO_LIMITS if most is None else Limits(rows_running=most)


@pytest.fixture
def make(make: Make) -> Make:
    return lambda limits, **settings: make(400, limits_of=limits, reuse=False, early_end=0.0, **settings)


def add(machine: Machine, name: str, caller: str, key: str | None = None, tokens: int = 4, rows: int = 1) -> Group:
    params: dict[str, Any] = {"do_sample": True, "num_return_sequences": rows} if rows > 1 else {}
    request = machine.request(name, [1, 2], caller=caller, caller_key=key, max_new_tokens=tokens, **params)
    return machine.add(request, at=0.0)


def running(machine: Machine) -> list[str]:
    return sorted(group.request.request_id for group in machine.scheduler.running)


def test_a_tenant_above_its_rows_runs_no_more_and_others_do(make: Make) -> None:
    machine = make(Set({"flood": 2}), max_rows=8)
    for index in range(20):
        add(machine, f"flood{index}", "flood")
    for index in range(4):
        add(machine, f"quiet{index}", "quiet")
    machine.step()
    assert running(machine) == ["flood0", "flood1", "quiet0", "quiet1", "quiet2", "quiet3"]
    machine.run()
    assert len(machine.ended) == 24


def test_a_key_above_its_rows_holds_up_none_of_its_tenants_other_keys(make: Make) -> None:
    machine = make(Set(keys={"small": 1}), max_rows=8)
    for index in range(5):
        add(machine, f"small{index}", "t", "small")
    for index in range(3):
        add(machine, f"other{index}", "t", "other")
    machine.step()
    assert sorted(running(machine)) == ["other0", "other1", "other2", "small0"]
    machine.run()
    assert [name for name in machine.ended if name.startswith("small")] == [f"small{index}" for index in range(5)]


def test_every_beam_and_sample_is_a_row_of_the_limit(make: Make) -> None:
    machine = make(Set({"t": 4}), max_rows=16)
    request = machine.request("beams", [1, 2], caller="t", num_beams=3, max_new_tokens=4)
    machine.add(request, at=0.0)
    add(machine, "one", "t")
    add(machine, "next", "t")
    machine.step()
    assert running(machine) == ["beams", "one"]
    machine.run()


def test_who_has_all_rows_of_its_limit_is_passed_by_nobody_and_holds_up_nobody(make: Make) -> None:
    """Its head counted as one that does not fit: after some passes it reserved, and nobody else was admitted."""
    machine = make(Set({"limited": 1}), max_rows=4)
    add(machine, "long", "limited", tokens=100)
    add(machine, "waits", "limited")
    for index in range(5 * PASSES):
        add(machine, f"other{index}", "other", tokens=2)
    while len(machine.ended) < 5 * PASSES:
        machine.step()
        assert machine.steps < 10 * PASSES, "held up"
    assert running(machine) == ["long"]
    machine.run()


def test_a_wide_head_gets_its_tenants_rows_although_single_ones_of_other_keys_never_stop(make: Make) -> None:
    """So many pass it; then its tenant's other keys wait, and no other tenant does."""
    machine = make(Set({"t": 4}), max_rows=6)
    for index in range(4):
        add(machine, f"first{index}", "t", "narrow", tokens=3 + index)
    machine.step()
    add(machine, "wide", "t", "wide", rows=4)
    for index in range(10 * PASSES):
        add(machine, f"narrow{index}", "t", "narrow", tokens=4)
        add(machine, f"other{index}", "other", tokens=2)
    while "wide" not in running(machine):
        machine.step()
        assert machine.steps < 20 * PASSES, "starved"
    passed = [name for name in [*machine.ended, *running(machine)] if name.startswith("narrow")]
    assert len(passed) == PASSES
    others = [name for name in machine.ended if name.startswith("other")]
    assert len(others) >= machine.steps - 3, "two rows of two tokens in each step: the other tenant runs on"
    machine.run()


def test_a_head_over_its_keys_limit_is_not_what_other_keys_wait_for(make: Make) -> None:
    machine = make(Set({"t": 8}, {"own": 2}), max_rows=8)
    add(machine, "runs", "t", "own", tokens=60)
    machine.step()
    add(machine, "pair", "t", "own", rows=2)
    for index in range(3 * PASSES):
        add(machine, f"other{index}", "t", "other", tokens=2)
    while len(machine.ended) < 3 * PASSES:
        machine.step()
        assert machine.steps < 40, "held up"
    assert running(machine) == ["runs"]
    machine.run()


def test_one_that_waits_already_when_its_limit_falls_below_its_rows_runs_alone(make: Make) -> None:
    limits = Set({"t": 4})
    machine = make(limits, max_rows=8)
    add(machine, "small", "t", tokens=5)
    machine.step()
    add(machine, "wide", "t", rows=4)
    limits.tenants["t"] = 2
    machine.step()
    assert running(machine) == ["small"]
    machine.run()
    assert machine.ended == {"small": "finished", "wide": "finished"}


def test_a_limit_that_is_lifted_holds_from_the_next_step_on(make: Make) -> None:
    limits = Set({"t": 1})
    machine = make(limits, max_rows=8)
    for index in range(3):
        add(machine, f"r{index}", "t", tokens=10)
    machine.step()
    assert running(machine) == ["r0"]
    del limits.tenants["t"]
    machine.step()
    assert running(machine) == ["r0", "r1", "r2"]
    machine.run()


@pytest.mark.parametrize("whose", ["tenant", "key"])
def test_more_rows_than_the_whole_limit_are_refused_with_expected_and_got(make: Make, whose: str) -> None:
    machine = make(Set({"t": 2}) if whose == "tenant" else Set({"t": 5}, {"k": 2}), max_rows=8)
    admission = Admission(make_backbone_spec(), (), machine.config, machine.scheduler.capacity)

    def of(rows: int, caller: str = "t", key: str | None = "k") -> None:
        admission.check(machine.request("r", [1], caller=caller, caller_key=key, num_beams=rows, max_new_tokens=1))

    of(2)
    with pytest.raises(InvalidParameter, match=rf"at most 2 rows \(rows_running of the {whose}\), got 3") as caught:
        of(3)
    assert caught.value.detail == {"expected": 2, "got": 3}
    of(3, caller="u", key="another")


@pytest.mark.parametrize("seed", range(8))
def test_no_limit_is_ever_exceeded_and_who_may_run_does(make: Make, seed: int) -> None:
    """Single rows and blocks for all: after each step somebody waits only because the rows of the engine, its tenant's
    or its key's are all taken."""
    rng = random.Random(seed)
    limits = Set({"a": rng.randint(1, 4), "b": rng.randint(1, 6)}, {"a0": rng.randint(1, 3), "c1": 1})
    machine, most = make(limits, max_rows=8), 8
    groups: list[Group] = []
    for _ in range(150):
        for _ in range(rng.choice([0, 0, 0, 3, 6])):
            tenant = rng.choice("aaabc")
            key = rng.choice([None, f"{tenant}0", f"{tenant}1"])
            groups.append(add(machine, f"r{len(groups)}", tenant, key, tokens=rng.randint(1, 12)))
        alive = [group for group in machine.scheduler.running if rng.random() < 0.02]
        for group in alive:
            machine.scheduler.preempt(group)
        waiting = [group for group in machine.scheduler.waiting if rng.random() < 0.02]
        for group in waiting:
            machine.abort(group)
        machine.scheduler.schedule()
        rows = Counter[str]()
        for group in machine.scheduler.running:
            rows.update((group.request.caller, group.request.key or ""))
        for name, limit in (limits.tenants | limits.keys).items():
            assert rows[name] <= limit
        if len(machine.scheduler.running) < most:
            for group in machine.scheduler.waiting:
                tenant, key = group.request.caller, group.request.key or ""
                taken = rows[tenant] >= limits.tenants.get(tenant, most) or rows[key] >= limits.keys.get(key, most)
                assert taken, "one that may run waits"
        machine.step()
    machine.run()
    assert len(machine.ended) == len(groups)
