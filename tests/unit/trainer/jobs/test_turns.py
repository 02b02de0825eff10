"""The rule by which tenants take turns at the trainer: ``trainer.jobs.turns``."""

from __future__ import annotations

import json
import random

import pytest

from trainer.jobs.job import claimed, new_job, progressed
from trainer.jobs.turns import Turns, Work, turns_from, work_of


def equal(tenant: str) -> float:
    return 1.0


@pytest.mark.parametrize("seed", range(5))
def test_tenants_that_wait_all_the_time_are_never_further_apart_than_one_job(seed: int) -> None:
    rng = random.Random(seed)
    weights = {name: rng.choice((0.5, 1.0, 3.0)) for name in "abcd"}
    largest = max(100 / weight for weight in weights.values())
    turns = Turns()
    waiting = [Work(name, f"{name}{n}", ends=rng.randint(1, 100)) for n in range(200) for name in "abcd"]
    rng.shuffle(waiting)
    left = dict.fromkeys("abcd", 200)
    running: list[Work] = []
    while all(left.values()):
        index, turns = turns.next(waiting, weights.__getitem__)
        work = waiting.pop(index)
        left[work.tenant] -= 1
        running.append(work)
        if len(running) > 3:
            ended = running.pop(rng.randrange(4))
            turns = turns.settled(ended.job_id, ended.ends)  # all of it ran
        counters = [turns.of(name) for name in "abcd"]
        assert max(counters) - min(counters) <= largest + 1e-6


def test_what_was_charged_in_the_end_is_what_ran_whatever_was_expected() -> None:
    rng = random.Random(1)
    turns, ran = Turns(), 0
    for n in range(50):
        work = Work("a", f"job-{n}", begins=rng.randint(0, 5), ends=rng.randint(6, 90), batch=4)
        _, turns = turns.next([work], lambda tenant: 2.0)
        step = rng.randint(work.begins, work.ends)
        turns = turns.settled(work.job_id, step).settled(work.job_id, 0)
        ran += (step - work.begins) * 4
    assert turns.of("a") == ran / 2
    assert not turns.charges


def test_who_begins_to_wait_is_lifted_to_those_that_wait_or_to_who_was_served_last() -> None:
    busy = [Work("busy", f"b{n}", ends=10) for n in range(3)]
    turns = Turns()
    for n in range(2):
        _, turns = turns.next(busy[n:], equal)
    assert turns.of("busy") == 20
    index, beside = turns.next([busy[2], Work("new", "n", ends=1)], equal)
    assert (index, beside.of("busy"), beside.of("new")) == (0, 30, 20)  # a tie: the older one first
    _, idle = turns.next(busy[2:], equal)
    _, alone = idle.next([Work("new", "n", ends=1)], equal)
    assert alone.of("new") == 31


def test_who_begins_to_wait_is_not_lifted_to_one_that_only_runs_far_below_those_that_wait() -> None:
    """Else it would go first until it had caught up with the one that waits: here for fifty jobs."""
    _, turns = Turns().next([Work("long", "l", ends=1)], equal)  # it runs all the time
    busy = [Work("busy", f"b{n}", ends=1) for n in range(60)]
    while len(busy) > 9:
        index, turns = turns.next(busy, equal)
        del busy[index]
    assert turns.charges["l"] and turns.of("busy") - turns.of("long") > 49
    waiting, taken = [*busy, *(Work("new", f"n{n}", ends=1) for n in range(9))], []
    for _ in range(8):
        index, turns = turns.next(waiting, equal)
        taken.append(waiting.pop(index).tenant)
    assert taken == ["busy", "new"] * 4


def test_who_goes_on_waiting_is_not_lifted_when_others_are_given_back() -> None:
    a, b = [Work("a", f"a{n}", ends=50) for n in range(3)], [Work("b", f"b{n}", ends=1) for n in range(9)]
    _, turns = Turns().next([*a, *b], equal)
    _, turns = turns.next([*a[1:], *b], equal)
    turns = turns.settled("a0", 0)  # it failed at once
    index, turns = turns.next([*b[1:], *a[1:]], equal)
    assert (index, turns.of("a")) == (8, 50)


def test_a_batch_of_any_size_costs_its_examples() -> None:
    small = work_of(new_job("a", "me", {"config": {"batch_size": 1}}, None, 4096).job)
    large = work_of(new_job("a", "me", {"config": {"batch_size": 4096}}, None, 1).job)
    assert small.expected == large.expected == 4096


def test_a_job_of_which_nothing_is_known_costs_a_step_and_a_resumed_one_what_is_left() -> None:
    assert work_of(new_job("a", "me", {}).job).expected == 1
    job = new_job("a", "me", {"config": {"batch_size": 2}}, None, 10).job
    job = progressed(claimed(job, 1, "w").job, 1, {"step": 7}, "training", 7).job
    assert work_of(job).expected == 6
    job = progressed(job, 1, {"evaluated": 1}, "evaluating", 10).job
    assert (job.steps, work_of(job).expected) == (10, 2)


def test_turns_are_the_same_after_json() -> None:
    waiting = [Work("a", "a1", 1, 5, 3), Work("b", "b1"), Work("b", "b2")]
    _, turns = Turns().next(waiting, equal)
    assert turns_from(json.dumps(turns.as_dict())) == turns
    assert turns_from(json.dumps(Turns().as_dict())) == Turns()
