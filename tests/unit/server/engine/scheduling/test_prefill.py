"""Prompts in chunks that fit the step's time, by what a token has cost so far; the machine's clock is a count."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.rate import Rate, attended_work, first_guess, tokens_within
from tests.support.scheduling import Machine, Make


@pytest.fixture
def make(make: Make) -> Make:
    return partial(make, 400, max_rows=8, max_step_tokens=64, reuse=False)


def with_a_stream(machine: Machine) -> Machine:
    """A row that answers, behind a prompt long enough to show what a token costs."""
    machine.add(machine.request("stream", range(40), max_new_tokens=1000))
    machine.step()
    return machine


def chunks_of(machine: Machine, name: str) -> list[int]:
    """The request's chunks, until it chooses its first token; the stream takes a token in each of these steps."""
    group, chunks = machine.add(machine.request(name, range(60), max_new_tokens=1)), []
    while name not in machine.ended:
        plan = machine.step()
        assert [row.group.request.request_id for row in plan.rows if row.count == 1][:1] == ["stream"]
        chunks += [row.count for row in plan.rows if row.group is group]
    assert sum(chunks) == 60
    return chunks


def test_a_slower_model_has_smaller_chunks_beside_a_row_that_answers(make: Make) -> None:
    firsts = [
        chunks_of(with_a_stream(make(max_step_ms=100.0, token_seconds=seconds)), "long")[0]
        for seconds in (1e-4, 2e-3, 5e-3, 10.0)
    ]
    assert firsts[0] == 60, "all of it fits"
    assert firsts == sorted(firsts, reverse=True)
    assert 40 <= firsts[1] <= 50, "100 ms at 2 ms a token; a little less, as attention costs something"
    assert 15 <= firsts[2] <= 20
    assert firsts[3] == 4, "a block is always computed"


def test_chunks_follow_the_pace_of_the_last_steps(make: Make) -> None:
    machine = with_a_stream(make(max_step_ms=100.0, token_seconds=2e-3))
    before = chunks_of(machine, "before")
    machine.token_seconds = 8e-3
    for index in range(40):
        chunks_of(machine, f"between {index}")
    assert max(chunks_of(machine, "slow")) <= before[0] / 3
    machine.token_seconds = 2e-3
    for index in range(60):
        chunks_of(machine, f"again {index}")
    assert max(chunks_of(machine, "quick")) >= before[0] - 5


def test_where_no_row_answers_time_is_no_limit(make: Make) -> None:
    machine = make(max_step_ms=1.0, token_seconds=10.0)
    for index in range(3):
        machine.add(machine.request(f"r{index}", [index, *range(60)], max_new_tokens=1))
    counts = [sum(row.count for row in machine.step().rows) for _ in range(2)]
    assert counts == [64, 64]


def test_several_prompts_share_the_steps_time(make: Make) -> None:
    machine = with_a_stream(make(max_step_ms=100.0, token_seconds=2e-3))
    for index in range(4):
        machine.add(machine.request(f"r{index}", [index, *range(19)], max_new_tokens=1))
    counts = [row.count for row in machine.step().rows]
    assert counts[:3] == [1, 20, 20], "the first are through, the third gets what is left"
    assert 40 <= sum(counts[1:]) <= 50


def test_no_prompt_waits_for_ever_behind_an_older_one(make: Make) -> None:
    machine = with_a_stream(make(max_step_ms=1.0, token_seconds=1.0))
    for index in range(4):
        machine.add(machine.request(f"r{index}", [index, *range(19)], max_new_tokens=1))
    steps = 0
    while len(machine.ended) < 4:
        plan = machine.step()
        assert sum(row.count for row in plan.rows) <= 1 + 4
        steps += 1
    assert steps == 4 * 20 // 4


def test_an_input_and_a_prompt_share_one_budget(make: Make) -> None:
    """Preempted beams compute again while another's input is encoded: the step's time is not spent twice."""
    alone, beside = (first_chunk_again(make, encoding) for encoding in (False, True))
    assert 20 <= alone <= 26, "50 ms at 2 ms a token"
    assert beside == 4, "an input of 100 tokens takes a layer at least, which is all of the budget; then a block"


def first_chunk_again(make: Make, encoding: bool) -> int:
    """Tokens that two beams compute in one step after a preemption, when their prompt is through again."""
    machine = make(max_step_ms=50.0, units=3, token_seconds=2e-3, reuse=True)
    machine.add(machine.request("stream", range(4), max_new_tokens=200))
    beams = machine.add(machine.request("beams", range(5), num_beams=2, max_new_tokens=60))
    while beams.rows[0].length < 20:
        machine.step()
    machine.scheduler.preempt(beams)  # what follows tells what a token costs
    while beams.rows[0].length < 40:
        machine.step()
    if encoding:
        machine.add(machine.request("next", range(100), max_new_tokens=1))
    machine.scheduler.preempt(beams)
    machine.step()
    return sum(row.count for row in machine.step().rows if row.group is beams)


def test_a_fixed_rate_makes_the_same_chunks_whatever_the_clock_says(make: Make) -> None:
    chunks = [
        chunks_of(with_a_stream(make(max_step_ms=5.0, token_seconds=seconds, deterministic=True)), "long")
        for seconds in (1e-9, 10.0)
    ]
    assert chunks[0] == chunks[1]
    assert 4 < chunks[0][0] < 60, "the budget holds, by the guess"


def test_only_calls_with_prompts_say_what_a_prompt_costs(make: Make) -> None:
    machine = with_a_stream(make(max_step_ms=100.0, token_seconds=2e-3))
    machine.token_seconds = 10.0
    for _ in range(20):
        machine.step()
    machine.token_seconds = 2e-3
    assert chunks_of(machine, "long")[0] > 40


def test_what_a_call_takes_anyway_is_not_the_prompts_fault(make: Make) -> None:
    """Shared out over all tokens, it made chunks smaller, which made the share larger: down to a block at last."""
    machine = with_a_stream(make(max_step_ms=100.0, token_seconds=2e-3, call_seconds=0.2))
    for _ in range(20):
        machine.step()
    for index in range(40):
        chunks_of(machine, f"between {index}")
    assert 40 <= max(chunks_of(machine, "long")) <= 55


def test_a_call_that_failed_says_nothing(make: Make) -> None:
    machine = make(max_step_ms=100.0)
    machine.add(machine.request("r", range(40), max_new_tokens=1))
    plan = machine.scheduler.schedule()
    assert plan.rows
    machine.scheduler.update([], StepPlan(rows=plan.rows), decoder_seconds=None)
    assert not machine.scheduler._prefill._rate._measured


def test_the_rate_begins_with_a_guess_and_large_calls_count_more() -> None:
    rate = Rate(first_guess(768))
    assert 0.5e-4 < rate.seconds(1) < 5e-4, "GPT-2 small: some 2 ms for a token in 12 layers"
    rate.add(100, 1.0)
    assert rate.seconds(50) == pytest.approx(0.5)
    assert rate.within(0.5) == pytest.approx(50)
    rate.add(1024, 20.48)
    assert rate.seconds(1) == pytest.approx(0.015)
    rate.add(1, 0.0)
    assert 0.014 < rate.seconds(1) < 0.015
    fixed = Rate(2.0, fixed=True)
    fixed.add(10, 1.0)
    assert fixed.seconds(1) == 2.0


def test_as_many_tokens_fit_as_their_work_allows() -> None:
    for hidden, keys, count in itertools.product((1, 64, 768), (0, 5, 900), (1, 7, 300)):
        work = attended_work(count, keys, hidden, causal=True)
        token_by_token = sum(attended_work(1, keys + before, hidden, causal=True) for before in range(count))
        assert work == pytest.approx(token_by_token)
        assert tokens_within(work * 1.0001, keys, hidden) == count
        assert tokens_within(work * 0.9999, keys, hidden) == count - 1
