"""The scheduler: all or nothing at admission, budgets kept, the youngest gives way, all end, contexts stay apart."""

from __future__ import annotations

import queue
import random
from typing import Any

import pytest

from prefixes.errors import InvalidArtifact
from server.engine.types import PrefixKey
from tests.support.scheduling import Machine, Make

A, B, C = (PrefixKey("default", name) for name in "abc")


def running(machine: Machine) -> list[str]:
    return [group.request.request_id for group in machine.scheduler.running]


def waiting(machine: Machine) -> list[str]:
    return [group.request.request_id for group in machine.scheduler.waiting]


# --- admission ---


def test_a_group_is_admitted_with_its_prefix_and_its_whole_prompt_or_not_at_all(make: Make) -> None:
    machine = make(9, lengths={A: 12}, reuse=False)
    machine.add(machine.request("old", range(8), max_new_tokens=20))  # 2 blocks, and one for its next token
    machine.step()
    machine.add(machine.request("young", range(20), A, max_new_tokens=1))  # 3 + 5 of the 7 that are left
    machine.wait_for(A)
    machine.step()
    assert running(machine) == ["old"]
    assert machine.store.residents() == frozenset()
    machine.run()
    assert machine.ended == {"old": "finished", "young": "finished"}
    assert machine.preempted == []


def test_what_waits_for_its_prefix_lets_others_pass(make: Make) -> None:
    machine = make(30, lengths={A: 4, B: 4})
    machine.gates[A] = queue.Queue()
    machine.add(machine.request("slow", range(4), A, max_new_tokens=2))
    assert not machine.scheduler.runnable()
    machine.add(machine.request("bare", range(4), max_new_tokens=2))
    machine.add(machine.request("quick", range(4), B, max_new_tokens=2))
    while len(machine.ended) < 2:
        machine.wait()
        machine.step()
    assert set(machine.ended) == {"bare", "quick"}
    machine.gates[A].put(None)
    machine.run()
    assert machine.ended["slow"] == "finished"


def test_who_came_first_runs_first_whichever_prefix_is_loaded_first(make: Make) -> None:
    """Groups that had arrived at one time ran in the order in which their loads had ended."""
    machine = make(30, lengths={A: 4, B: 4}, max_rows=1)
    for key in (A, B):
        machine.gates[key] = queue.Queue()
    for name, key in (("one", A), ("two", B)):
        machine.add(machine.request(name, range(4), key, max_new_tokens=1), at=1.0)
    for key in (B, A):
        machine.gates[key].put(None)
        machine.wait_for(key)
        machine.scheduler._entrance.take_in_loads()
    assert waiting(machine) == ["one", "two"]
    machine.run()
    assert list(machine.ended) == ["one", "two"]


def test_what_does_not_fit_is_not_overtaken_by_smaller_ones(make: Make) -> None:
    machine = make(10)
    machine.add(machine.request("first", range(12), max_new_tokens=12))
    machine.step()
    machine.add(machine.request("large", range(100, 132), max_new_tokens=1))
    machine.add(machine.request("small", range(4), max_new_tokens=1))
    machine.step()
    assert waiting(machine) == ["large", "small"]
    machine.run()
    assert list(machine.ended) == ["first", "large", "small"]


def test_no_more_rows_run_than_allowed(make: Make) -> None:
    machine = make(100, max_rows=5)
    for index in range(4):
        machine.add(machine.request(f"r{index}", range(3), num_beams=2, max_new_tokens=3))
    machine.step()
    assert running(machine) == ["r0", "r1"]
    machine.run()
    assert len(machine.ended) == 4


def test_a_failed_load_fails_its_own_group_alone(make: Make) -> None:
    machine = make(30, lengths={A: 4, B: 4})
    machine.failures[A] = InvalidArtifact("broken")
    for index, key in enumerate([A, B, None, A]):
        machine.add(machine.request(f"r{index}", range(4), key, max_new_tokens=2))
    machine.run()
    assert machine.ended == {"r0": "invalid_artifact", "r1": "finished", "r2": "finished", "r3": "invalid_artifact"}


def test_a_failed_load_is_told_although_the_head_of_the_queue_is_blocked(make: Make) -> None:
    """Groups behind a head that did not fit heard of their failure only when it had been admitted."""
    machine = make(12, lengths={A: 4})
    machine.failures[A] = InvalidArtifact("broken")
    machine.add(machine.request("runs", range(16), max_new_tokens=12))
    machine.step()
    machine.add(machine.request("blocked", range(100, 132), max_new_tokens=1))
    machine.add(machine.request("fails", range(4), A, max_new_tokens=1))
    machine.wait_for(A)
    machine.step()
    assert waiting(machine) == ["blocked"]
    assert machine.ended == {"fails": "invalid_artifact"}
    machine.run()


def test_a_request_behind_a_failed_load_has_a_load_of_its_own(make: Make) -> None:
    machine = make(30, lengths={A: 4})
    machine.failures[A] = InvalidArtifact("broken")
    machine.add(machine.request("early", range(4), A, max_new_tokens=1))
    machine.wait_for(A)
    machine.failures.clear()
    machine.add(machine.request("late", range(4), A, max_new_tokens=1))  # before the next step
    machine.run()
    assert machine.ended == {"early": "invalid_artifact", "late": "finished"}


def test_a_group_whose_load_failed_can_be_aborted_before_it_is_told(make: Make) -> None:
    machine = make(30, lengths={A: 4})
    machine.failures[A] = InvalidArtifact("broken")
    group = machine.add(machine.request("r", range(4), A, max_new_tokens=1))
    machine.wait_for(A)
    machine.add(machine.request("other", range(4), max_new_tokens=1))
    machine.abort(group)
    machine.run()
    assert machine.ended == {"r": "aborted", "other": "finished"}


def test_a_prefix_is_held_once_for_all_its_groups(make: Make) -> None:
    machine = make(12, lengths={A: 16})
    for index in range(4):
        machine.add(machine.request(f"r{index}", [index], A, max_new_tokens=2))
    machine.wait()
    machine.step()
    assert len(machine.scheduler.running) == 4
    machine.run()


# --- the step's budget ---


def test_rows_with_one_token_go_before_prompts_and_prompts_come_in_chunks(make: Make) -> None:
    machine = make(40, max_step_tokens=10, max_rows=8, reuse=False)
    for index in range(3):
        machine.add(machine.request(f"r{index}", range(2), max_new_tokens=20))
    machine.step()
    machine.add(machine.request("long", range(30), max_new_tokens=1))
    chunks = []
    while not machine.ended:
        plan = machine.step()
        assert [row.count for row in plan.rows[:3]] == [1, 1, 1]
        chunks += [row.count for row in plan.rows[3:]]
    assert chunks == [7, 7, 7, 7, 2]


def test_beams_decode_in_one_step(make: Make) -> None:
    machine = make(60, max_rows=8, max_step_tokens=8)
    machine.add(machine.request("beams", range(5), num_beams=4, max_new_tokens=6))
    machine.add(machine.request("long", range(40), max_new_tokens=2))
    while machine.ended.get("beams") is None:
        machine.step()  # the machine itself asserts that beams choose together


# --- preemption ---


def test_the_youngest_gives_way_and_the_oldest_goes_on(make: Make) -> None:
    machine = make(9, reuse=False)
    for name in ("oldest", "middle", "youngest"):
        machine.add(machine.request(name, range(4), max_new_tokens=20))
    machine.run()
    assert list(machine.ended) == ["oldest", "middle", "youngest"]
    assert "oldest" not in machine.preempted
    assert machine.preempted[0] == "youngest"


def test_a_preempted_group_comes_back_before_those_who_came_later(make: Make) -> None:
    machine = make(30)
    first = machine.add(machine.request("first", range(4), max_new_tokens=8))
    machine.step()
    for name in ("second", "third"):
        machine.add(machine.request(name, range(4), max_new_tokens=8))
    machine.scheduler.preempt(first)
    assert waiting(machine) == ["first", "second", "third"]
    machine.run()


def test_a_resumed_group_waits_until_what_its_rows_recompute_fits(make: Make) -> None:
    """Four rows share a prompt of one block but recompute three each: admitted by the prompt alone, the group was
    preempted in the steps after its prompt, again and again while the older ones ran."""
    machine = make(24, reuse=False, early_end=0.0)
    machine.add(machine.request("old", range(8), max_new_tokens=20), at=1.0)
    young = machine.add(
        machine.request("young", range(4), do_sample=True, num_return_sequences=4, max_new_tokens=13), at=2.0
    )
    while young.rows[0].decoding.output_length < 9:
        machine.step()
    machine.scheduler.preempt(young)
    machine.add(machine.request("oldest", range(36), max_new_tokens=6), at=0.0)
    machine.run()
    assert machine.preempted == ["young"]
    assert set(machine.ended.values()) == {"finished"}


def test_a_pin_that_takes_the_room_of_what_waits_fails_it_and_not_those_behind(make: Make) -> None:
    """Nothing would ever give way: the engine's thread ran in circles, and everybody behind waited for ever."""
    machine = make(10, lengths={A: 32, B: 8})
    machine.pin(A)
    machine.wait_for(A)
    machine.add(machine.request("no room", range(12), B, max_new_tokens=1))
    machine.add(machine.request("pinned", range(4), A, max_new_tokens=2))
    machine.run(limit=50)
    assert machine.ended == {"no room": "input_too_long", "pinned": "finished"}


@pytest.mark.parametrize("params", [{}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_a_pin_that_takes_the_room_of_what_runs_fails_it(make: Make, params: dict[str, Any]) -> None:
    machine = make(24, lengths={A: 56}, early_end=0.0)
    machine.add(machine.request("runs", range(8), max_new_tokens=60 // (1 + 2 * bool(params)), **params))
    machine.step()
    machine.pin(A)
    machine.wait_for(A)
    machine.run(limit=100)
    assert machine.ended == {"runs": "input_too_long"}
    assert machine.store.residents() == {A}


# --- sharing ---


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("params", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_rows_that_share_a_block_write_into_copies_of_it(make: Make, prompt: int, params: dict[str, Any]) -> None:
    machine = make(60)
    machine.add(machine.request("r", range(prompt), max_new_tokens=14, **params))
    machine.run()
    assert machine.ended == {"r": "finished"}


def test_a_repeated_prompt_computes_only_what_is_new(make: Make) -> None:
    machine = make(40)
    machine.add(machine.request("first", range(18), max_new_tokens=1))
    machine.run()
    assert machine.computed_tokens == 18
    machine.add(machine.request("again", range(18), max_new_tokens=1))
    machine.run()
    assert machine.computed_tokens == 18 + 2
    machine.add(machine.request("exact blocks", range(16), max_new_tokens=1))
    machine.run()
    assert machine.computed_tokens == 18 + 2 + 4


def test_reuse_is_not_shared_with_another_prefix_or_the_bare_backbone(make: Make) -> None:
    machine = make(60, lengths={A: 4, B: 4})
    for index, key in enumerate([None, A, B]):
        before = machine.computed_tokens
        machine.add(machine.request(f"r{index}", range(18), key, max_new_tokens=1))
        machine.run()
        assert machine.computed_tokens - before == 18


def test_a_preempted_row_finds_its_own_blocks_again(make: Make) -> None:
    machine = make(40)
    group = machine.add(machine.request("r", range(10), max_new_tokens=12))
    while group.rows[0].length < 18:
        machine.step()
    before = machine.computed_tokens
    machine.scheduler.preempt(group)
    machine.step()
    assert machine.computed_tokens - before == 2  # 17 were computed and four blocks of four kept; 18 stand there
    machine.run()


# --- random loads ---


def random_request(machine: Machine, rng: random.Random, name: str) -> Any:
    kind = rng.choice(["greedy", "greedy", "sample", "beams"])
    params: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 3, 5, 17])}
    if kind == "sample":
        params |= {"do_sample": True, "num_return_sequences": rng.choice([1, 2, 4])}
    elif kind == "beams":
        params |= {"num_beams": rng.choice([2, 3])}
    prompt = [0] * rng.choice([0, 4, 8]) + [rng.randrange(2) for _ in range(rng.choice([1, 2, 3, 4, 5, 9]))]
    return machine.request(name, prompt, rng.choice([None, *machine.prefixes]), **params)


@pytest.mark.parametrize("seed", range(25))
def test_everybody_ends_under_random_loads(make: Make, seed: int) -> None:
    """Few blocks, prefixes that come and go, preemption and aborts at any time; the machine checks every step."""
    rng = random.Random(seed)
    lengths = {PrefixKey(rng.choice(["one", "two"]), f"v{index}"): rng.choice([1, 4, 5, 9]) for index in range(4)}
    machine = make(
        rng.choice([20, 26, 40]), seed=seed, lengths=lengths, reuse=rng.random() < 0.7,
        max_step_tokens=rng.choice([8, 9, 30]), max_rows=8, max_prefix_bytes=rng.choice([None, 4]),
        units=rng.choice([0, 0, 3]), max_step_ms=rng.choice([1.0, 2e4, 1e6]),
    )
    machine.failures[rng.choice(list(lengths))] = InvalidArtifact("broken")
    groups, left, added = {}, 30, 0
    while left or machine.scheduler.waiting or machine.scheduler.running:
        while left and (rng.random() < 0.4 or not (machine.scheduler.waiting or machine.scheduler.running)):
            request = random_request(machine, rng, f"r{left}")
            left -= 1
            needed, capacity = machine.fits_alone(request)
            if needed <= capacity:
                groups[request.request_id] = machine.add(request, at=float(added))
                added += 1
        if machine.scheduler.running and rng.random() < 0.1:
            machine.scheduler.preempt(rng.choice(machine.scheduler.running))
        alive = [group for group in groups.values() if group.request.request_id not in machine.ended]
        if alive and rng.random() < 0.05:
            machine.abort(rng.choice(alive))
        if machine.scheduler.waiting or machine.scheduler.running:
            machine.wait()
            machine.step()
        assert machine.steps < 3000, "no end in sight"
    machine.run()
    assert machine.ended.keys() == groups.keys()


@pytest.mark.parametrize("seed", range(80))
def test_what_fits_alone_never_gives_way_when_alone(make: Make, seed: int) -> None:
    """The bound that admission promises: with exactly so many blocks, whatever is preempted, a request ends well."""
    rng = random.Random(seed)
    lengths, units = {A: rng.choice([1, 4, 5])}, rng.choice([0, 2])
    probe = make(1000, lengths=lengths, units=units)
    request = random_request(probe, rng, "r")
    needed, _ = probe.fits_alone(request)
    machine = make(needed, seed=seed, lengths=lengths, reuse=rng.random() < 0.5, max_step_tokens=rng.choice([8, 16]),
                   max_rows=8, units=units)
    machine.add(request)
    while machine.scheduler.waiting or machine.scheduler.running:
        if machine.scheduler.running and rng.random() < 0.15:
            machine.scheduler.preempt(machine.scheduler.running[0])
        machine.may_preempt = False
        machine.wait()
        machine.step()
        machine.may_preempt = True
        assert machine.steps < 500
    assert machine.ended == {"r": "finished"}
