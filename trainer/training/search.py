"""Successive halving: which trials a budget pays for, how long each one is, and which of them go on.

Many short trials choose between the candidates; the best third of a round trains again, for longer, in the next one;
the best of all trains last and longest. Every trial is a whole run, whose rate falls to its end, so that trials of one
round are compared at equal steps. Owns the rounds, the survivors and the candidates; knows no tensor and no clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from trainer.training.config import EXAMPLES, RANDOM, TrainConfig

LENGTHS: Final = (20, 10, 40)
RATES: Final = {"direct": (5e-3, 2e-2, 1e-3), "mlp": (1e-3, 3e-4, 3e-3)}
"""The most plausible first."""

SEARCH_SHARE: Final = 0.35  # of the budget, for choosing
FINAL_SHARE: Final = 0.5  # for the last trial; the rest is for what a run needs beside its trials
KEPT: Final = 3  # one of so many goes on
LEAST_STEPS: Final = 8  # of a trial whose loss tells anything
CHECKS: Final = 8  # validations of the last trial, at most
CHECK_SHARE: Final = 0.25  # of the last trial's time, for validations


@dataclass(frozen=True)
class Choice:
    """What is searched for."""

    prefix_length: int
    init: str
    method: str
    frozen_positions: int
    learning_rate: float

    def as_dict(self) -> dict[str, Any]:
        """Options of a TrainConfig."""
        return asdict(self)


@dataclass(frozen=True)
class Cost:
    """Seconds to begin a trial, of a step, and of a validation."""

    start: float
    step: float
    validation: float

    def steps(self, seconds: float, validations: int) -> int:
        """The steps of a trial of so many seconds."""
        return int((seconds - self.start - validations * self.validation) / self.step)


@dataclass(frozen=True)
class Round:
    """So many trials of so many steps, with as many validations, each."""

    trials: int
    steps: int
    checks: int = 1


def candidates(config: TrainConfig, fixed: Collection[str], lengths: Sequence[int]) -> list[Choice]:
    """Every combination of what is not ``fixed``, the most plausible first; of what is fixed, ``config``'s value.

    Each axis lists its values by plausibility, and a combination is as plausible as its places are near the front. Of
    equals the other start comes first: which start suits a backbone is the least known.
    """
    if "prefix_length" in fixed:
        lengths = [config.prefix_length]
    if "init" in fixed:
        starts = [(config.init, config.method)]
    elif "method" in fixed:
        starts = [(RANDOM, config.method), (EXAMPLES, config.method)]
    else:
        starts = [(RANDOM, "mlp"), (EXAMPLES, "direct")]
    ranked: list[tuple[tuple[int, int, int], Choice]] = []
    for (i, length), (j, (init, method)) in itertools.product(enumerate(lengths), enumerate(starts)):
        frozen = config.frozen_positions
        if "init" not in fixed and "frozen_positions" not in fixed:
            frozen = int(init == EXAMPLES and method == "direct" and length > 1)
        rates = [config.learning_rate] if "learning_rate" in fixed else RATES[method]
        ranked += [((i + j + k, -j, i), Choice(length, init, method, frozen, rate)) for k, rate in enumerate(rates)]
    return [choice for _, choice in sorted(ranked, key=lambda pair: pair[0])]


def plan_rounds(seconds: float, cost: Cost, count: int, most_steps: int) -> list[Round]:
    """The rounds that ``seconds`` pay for, with at most ``count`` candidates and ``most_steps`` steps in all.

    The last round is the one long trial. There are fewer candidates where so many trials would be too short to tell
    anything, down to one, which is not compared with any.
    """

    def part(share: float, trials: int, checks: int = 1) -> Round:
        steps = min(cost.steps(share * seconds / trials, checks), int(share * most_steps / trials))
        return Round(trials, steps, checks)

    def last(share: float) -> Round:
        checks = int(CHECK_SHARE * share * seconds / cost.validation) if cost.validation else CHECKS
        return part(share, 1, max(1, min(CHECKS, checks)))

    longest = last(FINAL_SHARE)
    for first in range(count, 1, -1):
        trials = [first]
        while trials[-1] > KEPT:
            trials.append(-(-trials[-1] // KEPT))
        rounds = [part(SEARCH_SHARE / len(trials), number) for number in trials]
        if rounds[0].steps >= LEAST_STEPS and rounds[-1].steps < longest.steps:
            return [*rounds, longest]
    only = last(SEARCH_SHARE + FINAL_SHARE)
    return [replace(only, steps=max(1, only.steps))]


def survivors(losses: Sequence[float | None], count: int) -> list[int]:
    """The numbers of the ``count`` lowest losses, the lowest first. None is of a trial without a result."""
    told = [(loss, index) for index, loss in enumerate(losses) if loss is not None]
    return [index for _, index in sorted(told)[:count]]
