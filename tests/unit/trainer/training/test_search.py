"""Successive halving: what a budget pays for, and who goes on."""

from __future__ import annotations

import itertools
import random

import pytest

from prefixes.errors import InvalidParameter
from trainer.training.budget import Auto, Budget
from trainer.training.config import TrainConfig
from trainer.training.curve import doubled
from trainer.training.search import (
    CHECKS,
    LENGTHS,
    Choice,
    Cost,
    Round,
    candidates,
    plan_rounds,
    survivors,
)


def price(rounds: list[Round], cost: Cost) -> float:
    """Seconds of a whole schedule."""
    return sum(part.trials * (cost.start + part.steps * cost.step + part.checks * cost.validation) for part in rounds)


@pytest.mark.parametrize("seed", range(200))
def test_a_schedule_costs_less_than_its_budget_and_lets_fewer_and_longer_trials_go_on(seed: int) -> None:
    rng = random.Random(seed)
    cost = Cost(rng.choice([0, 0.5, 5]), 10 ** rng.uniform(-3, 1), rng.choice([0, 0.1, 3]))
    seconds, count, most = 10 ** rng.uniform(1.5, 4), rng.randint(1, 18), rng.choice([50, 1000, 10**6])
    rounds = plan_rounds(seconds, cost, count, most)
    assert rounds[-1].trials == 1 and rounds[0].trials <= count
    if rounds[-1].steps > 1:
        assert price(rounds, cost) < 0.9 * seconds
    assert sum(part.trials * part.steps for part in rounds) <= most
    assert all(part.steps >= 8 for part in rounds[:-1]), "a trial that tells nothing is none"
    for one, following in itertools.pairwise(rounds):
        assert following.trials < one.trials and following.steps > one.steps
        assert 1 < one.trials <= 3 * following.trials


def test_a_greater_budget_compares_more_candidates_until_all_are_there_and_then_longer() -> None:
    cost, made = Cost(0, 1, 0), [plan_rounds(seconds, Cost(0, 1, 0), 18, 10**9) for seconds in (30, 300, 3000, 30000)]
    assert [rounds[0].trials for rounds in made] == sorted(rounds[0].trials for rounds in made)
    assert made[0] == [Round(1, int(30 * 0.85), CHECKS)], "nothing is compared for want of time"
    assert made[-1][0].trials == 18 and made[-1][0].steps > made[-2][0].steps
    assert plan_rounds(0.5, cost, 18, 10**9) == [Round(1, 1, CHECKS)]


def test_validations_that_cost_much_are_few_and_leave_the_time_to_steps() -> None:
    """On a busy machine eight of them took the whole budget, and the last trial had one step."""
    (only,) = plan_rounds(40, Cost(1.3, 0.6, 10.4), 18, 10**9)
    assert only.checks == 1 and only.steps > 30
    assert plan_rounds(4000, Cost(1.3, 0.6, 10.4), 18, 10**9)[-1].checks == CHECKS


def test_the_lowest_losses_survive_the_earlier_trial_where_they_are_equal_and_none_without_a_loss() -> None:
    assert survivors([3.0, None, 1.0, 2.0, 1.0], 3) == [2, 4, 3]
    assert survivors([None, 2.0], 2) == [1]
    assert survivors([], 1) == []


def test_what_is_fixed_is_not_searched_and_the_most_plausible_is_the_first() -> None:
    config = TrainConfig(prefix_length=7, learning_rate=0.123)
    free = candidates(config, (), LENGTHS)
    assert len(free) == len(set(free)) == 3 * 2 * 3
    assert free[:2] == [Choice(20, "random", "mlp", 0, 1e-3), Choice(20, "examples", "direct", 1, 5e-3)]
    assert {(choice.init, choice.method) for choice in free} == {("examples", "direct"), ("random", "mlp")}
    assert {choice.prefix_length for choice in candidates(config, ("prefix_length",), LENGTHS)} == {7}
    assert {choice.learning_rate for choice in candidates(config, ("learning_rate",), LENGTHS)} == {0.123}
    words = TrainConfig(init="some words", method="direct", frozen_positions=2)
    assert {(c.init, c.method, c.frozen_positions) for c in candidates(words, ("init",), LENGTHS)} == {
        ("some words", "direct", 2)
    }
    every = ("prefix_length", "init", "method", "learning_rate")
    assert len(candidates(config, every, LENGTHS)) == 1
    for choice in free:
        TrainConfig(**{**vars(config), **choice.as_dict()})  # each can be trained


def test_a_budget_says_no_before_a_step_that_would_pass_its_end() -> None:
    now = [0.0]
    budget = Budget(100, lambda: now[0])
    budget.before = 10
    asked = []
    while not budget.is_exhausted():
        asked.append(budget.spent)
        now[0] += 7
    assert asked[-1] + 7 <= 98 and budget.spent <= 98
    budget.begin_trial()
    assert budget.is_exhausted()


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_budget_that_is_none_is_refused(minutes: float) -> None:
    with pytest.raises(InvalidParameter, match="budget_minutes: expected above 0"):
        Auto(minutes)


def test_epochs_and_steps_are_refused_beside_a_budget() -> None:
    with pytest.raises(InvalidParameter, match="epochs: expected none beside auto"):
        Auto(1, ("epochs",))


def test_twice_the_examples_are_estimated_between_the_last_gain_and_a_shrinking_one() -> None:
    made = doubled([(25, 4.0), (50, 3.0), (100, 2.5)])
    assert (made["low"], made["high"], made["estimate"]) == (2.0, 2.25, 2.125)
    assert made["examples"] == 200
    steeper = doubled([(25, 4.0), (50, 3.5), (100, 2.5)])
    assert steeper["low"] == 1.5 and steeper["high"] == 2.0, "never more than what was seen"


@pytest.mark.parametrize("losses", [(3.0, 3.0, 2.0), (3.0, 2.0, 2.1), (2.0, 3.0, 2.5)])
def test_nothing_is_said_where_a_doubling_did_not_help(losses: tuple[float, ...]) -> None:
    made = doubled(list(zip((1, 2, 4), losses, strict=True)))
    assert made["estimate"] is None and "did not lower" in made["reason"]
