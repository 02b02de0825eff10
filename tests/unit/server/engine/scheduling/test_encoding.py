"""The encoder's inputs: encoded in cohorts and groups of layers, while rows run, at the pace of the budget."""

from __future__ import annotations

from functools import partial

import pytest

from server.engine.config import EngineConfig
from server.engine.scheduling.plan import StepPlan
from server.engine.types import PrefixKey
from tests.support.scheduling import Machine, Make

A, B = PrefixKey("default", "a"), PrefixKey("default", "b")
LAYERS, UNITS = 6, 9


@pytest.fixture
def make(make: Make) -> Make:
    """Encoders of six layers, of a second for a token, and of three units of a sixth behind them."""
    return partial(make, 200, units=UNITS, max_rows=8)


def names(machine: Machine) -> list[list[str]]:
    return [[group.request.request_id for group in work.groups] for work in machine.encoder_calls]


def units(machine: Machine) -> list[range]:
    return [work.units for work in machine.encoder_calls]


def test_an_article_is_encoded_in_as_many_layers_as_the_budget_allows_while_rows_go_on(make: Make) -> None:
    machine = make(max_step_ms=45e3)
    running = machine.add(machine.request("old", range(5), max_new_tokens=30))
    machine.step()
    while running.encoding:
        machine.step()
    before = running.rows[0].length
    machine.encoder_calls.clear()
    machine.add(machine.request("article", range(20), max_new_tokens=2))
    machine.step()
    steps = 1
    while len(machine.encoder_calls[-1].units) and machine.encoder_calls[-1].units.stop < UNITS:
        machine.step()
        steps += 1
    assert units(machine) == [range(2), range(2, 4), range(4, 6), range(6, 9)], "45 s are two layers over 20 tokens"
    assert running.rows[0].length - before == steps, "a row that runs takes a token in every step"
    machine.run()


def test_an_input_too_long_for_the_budget_goes_layer_by_layer(make: Make) -> None:
    machine = make(max_step_ms=5.0)
    machine.add(machine.request("article", range(20), max_new_tokens=1))
    machine.run()
    assert units(machine) == [range(unit, unit + 1) for unit in range(UNITS)]


def test_inputs_that_wait_go_together_as_far_as_the_budget_allows(make: Make) -> None:
    machine = make(max_step_ms=25e3, lengths={A: 3, B: 3})
    machine.add(machine.request("first", range(4), max_new_tokens=9))  # tells what a token costs
    machine.run()
    machine.encoder_calls.clear()
    for name, key in (("one", A), ("two", B), ("three", None), ("four", A)):
        machine.add(machine.request(name, [7, *range(9)], key, max_new_tokens=3), at=float(len(name)))
    for key in (A, B):
        machine.wait_for(key)
    machine.run()
    cohorts = [name for index, name in enumerate(names(machine)) if not index or name != names(machine)[index - 1]]
    assert cohorts == [["one", "two"], ["four", "three"]], "20 tokens fit in 25 s, 30 do not"


def test_a_newcomer_waits_for_the_cohort_that_is_under_way(make: Make) -> None:
    machine = make(max_step_ms=1.0)
    machine.add(machine.request("old", range(8), max_new_tokens=3))
    machine.step()
    machine.add(machine.request("young", [9, *range(8)], max_new_tokens=3))
    machine.run()
    assert names(machine) == [["old"]] * UNITS + [["young"]] * UNITS


@pytest.mark.parametrize("leave", ["abort", "preempt"])
def test_a_group_that_leaves_its_cohort_does_not_hold_it_up(make: Make, leave: str) -> None:
    machine = make(max_step_ms=30e3, max_encoder_tokens=100)
    machine.add(machine.request("first", range(4), max_new_tokens=1))  # tells what a token costs: 27 fit
    machine.run()
    machine.encoder_calls.clear()
    groups = [machine.add(machine.request(name, [index, *range(8)], max_new_tokens=3), at=float(index))
              for index, name in enumerate(("one", "two", "three"))]
    machine.step()
    first = names(machine)[0]
    assert first == ["one", "two", "three"]
    machine.step()
    if leave == "abort":
        machine.abort(groups[1])
    else:
        machine.scheduler.preempt(groups[1])
    machine.run()
    others = LAYERS - 2 + 1  # a layer at a time, then what is behind the layers at once
    assert names(machine)[2 : 2 + others] == [["one", "three"]] * others
    assert machine.ended["one"] == machine.ended["three"] == "finished"
    assert names(machine)[2 + others :] == ([] if leave == "abort" else [["two"]] * 3)


def test_an_input_that_was_encoded_before_is_not_encoded_again(make: Make) -> None:
    machine = make(lengths={A: 3})
    for name in ("first", "again"):
        machine.add(machine.request(name, range(10), A, max_new_tokens=4))
        machine.wait_for(A)
        machine.run()
    assert names(machine)[-1] == ["first"]
    calls = len(machine.encoder_calls)
    machine.add(machine.request("longer", range(11), A, max_new_tokens=4))  # all of an input counts, not its beginning
    machine.add(machine.request("bare", range(10), max_new_tokens=4))
    machine.wait_for(A)
    machine.run()
    assert {name for work in names(machine)[calls:] for name in work} == {"longer", "bare"}


def test_without_reuse_every_input_is_encoded(make: Make) -> None:
    machine = make(reuse=False, max_step_ms=1e9)
    for name in ("first", "again"):
        machine.add(machine.request(name, range(10), max_new_tokens=2))
        machine.run()
    assert {name for work in names(machine) for name in work} == {"first", "again"}


def test_beams_share_one_encoded_input(make: Make) -> None:
    machine = make(max_step_ms=1e9, max_encoder_tokens=100)
    group = machine.add(machine.request("beams", range(10), num_beams=4, max_new_tokens=6))
    held = 0
    while machine.scheduler.waiting or machine.scheduler.running:
        machine.step()
        if group.input:
            held = max(held, len(group.input.blocks))
    assert held == machine.ledger.blocks_for(10)
    assert sum(len(work.units) for work in machine.encoder_calls) == UNITS


@pytest.mark.parametrize("arrive", ["one after another", "together"])
def test_no_call_takes_longer_than_the_budget_unless_it_is_one_layer_of_one_input(make: Make, arrive: str) -> None:
    """Layers and cross-attention's units cost differently, and inputs are of all lengths."""
    machine, budget = make(max_step_ms=60e3, max_encoder_tokens=10**6), 60.0
    machine.add(machine.request("warm-up", range(8), max_new_tokens=1))
    machine.run()
    machine.encoder_seconds.clear()
    machine.encoder_calls.clear()
    for index, length in enumerate((50, 3, 50, 20, 100, 1, 30, 58)):
        machine.add(machine.request(f"r{index}", [index, *range(length - 1)], max_new_tokens=2))
        if arrive == "one after another":
            machine.run()
    machine.run()
    for work, seconds in zip(machine.encoder_calls, machine.encoder_seconds, strict=True):
        alone = len(work.groups) == 1 and len(work.units) == 1
        assert seconds <= budget + 1e-6 or alone, (names(machine), work.units, seconds)
    assert any(len(work.groups) > 1 for work in machine.encoder_calls) == (arrive == "together")
    assert any(len(work.units) > 1 for work in machine.encoder_calls)


def test_a_budget_has_to_be_a_number_and_a_clock_may_stand_still(make: Make) -> None:
    for budget in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_step_ms"):
            EngineConfig(max_step_ms=budget)
    machine = make()
    machine.add(machine.request("r", range(5), max_new_tokens=1))
    work = machine.scheduler.schedule().encode
    assert work
    machine.scheduler.update([], StepPlan(encode=work), encoder_seconds=0.0)
    assert machine.scheduler.schedule().encode, "what takes no time can go on"
