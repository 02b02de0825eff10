"""Tenants share what is computed by their weights; a flood makes nobody wait but its own tenant."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from server.engine.row import Group
from server.engine.scheduling.tenant_queue import PASSES
from server.engine.types import PrefixKey
from tests.support.fairness import Service, served
from tests.support.figures import Figures
from tests.support.scheduling import Machine, Make

A = PrefixKey("owner", "a")


# --- what is charged ---


@pytest.mark.parametrize(
    ("params", "rows"),
    [({}, 1), ({"num_beams": 3}, 3), ({"do_sample": True, "num_return_sequences": 4}, 4)],
    ids=["greedy", "beams", "samples"],
)
@pytest.mark.parametrize("units", [0, 3], ids=["decoder", "encoder"])
def test_every_rows_tokens_are_charged_and_a_recomputation_is_not(
    make: Make, params: dict[str, Any], rows: int, units: int
) -> None:
    machine = make(80, reuse=False, lengths={A: 8}, units=units, early_end=0.0)
    group = machine.add(machine.request("r", range(10), A, caller="t", max_new_tokens=6, **params))
    while group.rows[0].decoding.output_length < 3:
        machine.wait()
        machine.step()
    for _ in range(2):
        machine.scheduler.preempt(group)
        machine.step()
    machine.run()
    prompt = 10 + bool(units)  # the decoder's own first token behind an encoder
    assert machine.scheduler.counters.of("t") == prompt + 2 * rows * 6
    assert served(machine, [group])["t"] == 10 + 2 * rows * 6
    assert machine.computed_tokens > (1 if units else 10) + rows * 5, "something was computed again"


def test_a_prompt_that_is_remembered_is_charged_for_what_is_new(make: Make) -> None:
    machine = make(40)
    charged = []
    for name in ("first", "again"):
        before = machine.scheduler.counters.of("t")
        machine.add(machine.request(name, range(18), caller="t", max_new_tokens=1))
        machine.run()
        charged.append(machine.scheduler.counters.of("t") - before)
    assert charged == [18 + 2, 2 + 2]


def test_an_aborted_request_is_charged_for_what_it_got(make: Make) -> None:
    machine = make(40, reuse=False)
    group = machine.add(machine.request("r", range(5), caller="t", max_new_tokens=30))
    for _ in range(4):
        machine.step()
    machine.abort(group)
    assert machine.scheduler.counters.of("t") == 5 + 2 * 4


# --- shares ---

LONGEST_INPUT, LONGEST_OUTPUT, MOST_ROWS = 12, 10, 4  # of a request


def backlog(machine: Machine, rng: random.Random, tenant: str, count: int, mixed: bool) -> list[Group]:
    groups = []
    for index in range(count):
        kind = rng.choice(["greedy", "beams", "samples"]) if mixed else "greedy"
        params: dict[str, Any] = {"max_new_tokens": rng.randint(1, LONGEST_OUTPUT)}
        if kind == "beams":
            params |= {"num_beams": rng.choice([2, 3])}
        elif kind == "samples":
            params |= {"do_sample": True, "num_return_sequences": rng.choice([2, 4])}
        key = rng.choice([None, *machine.prefixes])
        prompt = [rng.randrange(1, 1000) for _ in range(rng.randint(1, LONGEST_INPUT))]
        groups.append(machine.add(machine.request(f"{tenant}{index}", prompt, key, caller=tenant, **params), at=0.0))
    return groups


def mixed_backlog(make: Make, seed: int, rows: int, counts: dict[str, int], mixed: bool, **settings: Any
                  ) -> tuple[Machine, list[Group]]:
    """A machine at which tenants have so many requests each, their prefix loaded."""
    machine = make(400, seed=seed, lengths={A: 9}, reuse=False, max_rows=rows, **settings)
    rng = random.Random(seed)
    groups = [group for tenant, count in counts.items() for group in backlog(machine, rng, tenant, count, mixed)]
    machine.wait_for(A)
    return machine, groups


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mixed", [False, True], ids=["one row each", "beams and samples"])
def test_two_backlogged_tenants_are_served_by_their_weights(
    make: Make, seed: int, mixed: bool, record_property: Callable[[str, object], None]
) -> None:
    """Between any two steps their service over weight differs by 2 * U at most, as in the paper's theorem 4.4.

    U = (L + 2 * R * N) / w for the lighter one: when a tenant is admitted it has the least counter. Then its counter
    grows by that input, at most L tokens, and by the outputs of its rows that run, at most R rows of N tokens, before
    another must have its turn. A prefix of whatever length counts nothing. Where a group of r rows may not fit at once,
    ``PASSES`` others pass its tenant, each with an input and r rows.
    """
    weights, rows = {"heavy": 2.0, "light": 1.0}, 6
    machine, groups = mixed_backlog(
        make, seed, rows, {"heavy": 250, "light": 125} if mixed else {"heavy": 100, "light": 50}, mixed,
        weight_of=lambda tenant: weights.get(tenant, 1.0),
    )  # fmt: skip
    service = Service(weights)
    while all(machine.scheduler.waiting.count(tenant) for tenant in weights):
        machine.step()
        service.note(machine, groups)
    passing = PASSES * (LONGEST_INPUT + 2 * MOST_ROWS * LONGEST_OUTPUT) if mixed else 0
    bound = 2 * (LONGEST_INPUT + 2 * rows * LONGEST_OUTPUT + passing)
    tokens = served(machine, groups)
    note = f"served {dict(tokens)}; by weight apart by {service.spread:.0f} at most, bound {bound}"
    record_property(*Figures("fairness", cases=len(groups), notes=[note]).as_property())
    assert service.spread <= bound
    in_order_of_arrival = tokens.total() / 4  # with a token of each in turn one would be so much ahead of the other
    assert in_order_of_arrival > (0.9 if mixed else 2) * bound, "too short a run to show anything"


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_with_preemption_and_aborts_too(make: Make, seed: int) -> None:
    """What is computed again is not charged, and a preempted group goes on at its tenant's turn, not before."""
    weights, rows = {"heavy": 2.0, "light": 1.0}, 6
    machine, groups = mixed_backlog(
        make, seed, rows, {"heavy": 250, "light": 125}, True, weight_of=lambda tenant: weights.get(tenant, 1.0)
    )
    service, rng = Service(weights), random.Random(seed)
    while all(machine.scheduler.waiting.count(tenant) for tenant in weights):
        if machine.scheduler.running and rng.random() < 0.3:
            machine.scheduler.preempt(rng.choice(machine.scheduler.running))
        if rng.random() < 0.1:
            alive = [group for group in groups if group.request.request_id not in machine.ended]
            machine.abort(rng.choice(alive))
        machine.step()
        service.note(machine, groups)
    assert len(machine.preempted) > 20 and "aborted" in machine.ended.values()
    passing = PASSES * (LONGEST_INPUT + 2 * MOST_ROWS * LONGEST_OUTPUT)
    bound = 2 * (LONGEST_INPUT + 2 * rows * LONGEST_OUTPUT + passing)
    assert service.spread <= bound
    assert served(machine, groups).total() / 4 > 0.75 * bound, "too short a run to show anything"


def test_many_rows_are_not_starved_by_single_ones_that_always_fit(make: Make) -> None:
    """Each head that did not fit let ``PASSES`` others pass: who never fitted at once fell behind for ever."""
    machine = make(400, reuse=False, max_rows=4, early_end=0.0)
    wide: tuple[dict[str, Any], ...] = (
        {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 2}, {"max_new_tokens": 1},
    )  # fmt: skip
    groups = [
        machine.add(machine.request(f"wide{index}", [1], caller="wide", **wide[index % 2]), at=0.0)
        for index in range(200)
    ] + [
        machine.add(machine.request(f"narrow{index}", [1], caller="narrow", max_new_tokens=8), at=0.0)
        for index in range(200)
    ]
    service = Service({"wide": 1.0, "narrow": 1.0})
    while all(machine.scheduler.waiting.count(tenant) for tenant in service.weights):
        machine.step()
        service.note(machine, groups)
    each = 1 + 2 * 8
    assert service.spread <= 2 * (1 + 2 * 4 * 8 + PASSES * each)
    tokens = served(machine, groups)
    assert min(tokens.values()) > 0.7 * max(tokens.values())


# --- a flood ---


def test_a_flood_of_long_requests_holds_a_short_one_up_for_a_bounded_number_of_steps(
    make: Make, record_property: Callable[[str, object], None]
) -> None:
    """A row of the flood ends within N steps and those of its prompts; the short one is next, or the one after."""
    long_input, long_output, rows = 24, 40, 8
    waits: dict[str, list[int]] = {}
    for name in ("fair", "in order of arrival"):
        quiet = "quiet" if name == "fair" else "flood"
        machine = make(400, reuse=False, max_rows=rows)
        for index in range(1000):
            machine.add(
                machine.request(f"long{index}", [index] * long_input, caller="flood", max_new_tokens=long_output),
                at=0.0,
            )
        began, waited = dict[str, int](), list[int]()
        for step in range(600):
            if step % 60 == 30:
                began[f"short{step}"] = machine.steps
                machine.add(machine.request(f"short{step}", [1, 2], caller=quiet, max_new_tokens=2), at=float(step))
            machine.step()
            waited += [machine.steps - began.pop(ended) for ended in list(began) if ended in machine.ended]
        waits[name] = waited
        assert name != "fair" or not began, "all short ones have been answered"
    prompts = rows * -(-long_input // (machine.config.max_step_tokens - rows))
    bound = 2 * (long_output + prompts) + 2
    note = f"short requests beside 1,000 long ones took {sorted(waits['fair'])} steps, bound {bound}"
    record_property(*Figures("fairness", cases=10, notes=[note]).as_property())
    assert len(waits["fair"]) == 10 and max(waits["fair"]) <= bound
    assert waits["in order of arrival"] == [], "in order of arrival none is answered before the flood"


def test_a_flooder_that_comes_back_has_not_saved_up_what_it_did_not_use(make: Make) -> None:
    """A tenant with one row that never ended kept its small counter, and then its flood went before all others."""
    machine = make(400, reuse=False, max_rows=4)
    machine.add(machine.request("drip", [1], caller="saver", max_new_tokens=300))
    steady = [
        machine.add(machine.request(f"s{index}", [1, 2, 3], caller="steady", max_new_tokens=10), at=0.0)
        for index in range(100)
    ]
    for _ in range(120):
        machine.step()
    before = served(machine, steady)["steady"]
    flood = [
        machine.add(machine.request(f"f{index}", [1, 2, 3], caller="saver", max_new_tokens=10), at=1.0)
        for index in range(100)
    ]
    for _ in range(60):
        machine.step()
    share = served(machine, flood)["saver"] / (served(machine, steady)["steady"] - before)
    assert 0.4 < share <= 1.1, "the row that never ends counts for its tenant"
