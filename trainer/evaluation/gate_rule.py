"""The gate's rule: whether a new version may take the current one's place, from both scores of the same inputs.

Owns the rule, the numbers it is decided by, and the words that say so. Knows no prefix, no data and no registry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from prefixes.errors import InvalidParameter
from trainer.evaluation.bootstrap import difference_interval
from trainer.evaluation.scores.base import Score

Verdict = Literal["promoted", "rejected", "undecided"]

LEAST_INPUTS: Final = 50
"""With fewer inputs nothing is decided."""
MOST_MOVES: Final = 2
"""After so many moves of the alias while versions were scored, nothing is decided."""
MOST_MARGIN: Final = 1000.0
METRIC_OF: Final[Mapping[str, str]] = {
    "bleu": "bleu", "ter": "ter", "chrf": "chrf", "rouge1": "rouge", "rouge2": "rouge", "rougeL": "rouge",
    "meteor": "meteor", "coco_rougeL": "coco_rouge", "f1": "fields", "exact": "fields",
}  # fmt: skip
"""The scores that a rule may name, and the metric of each. NIST and CIDEr are no sums over inputs."""


@dataclass(frozen=True)
class Rule:
    """Promote if the new version is, with 95 % confidence, at most ``margin`` worse by the score ``metric``.

    A negative margin asks for that much more. Raises InvalidParameter for another score or margin.
    """

    metric: str
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.metric not in METRIC_OF:
            names = ", ".join(METRIC_OF)
            raise InvalidParameter(f"promote_if: expected one of {names}, got {self.metric!r}", parameter="promote_if")
        if not math.isfinite(self.margin) or abs(self.margin) > MOST_MARGIN:
            raise InvalidParameter(
                f"promote_if: expected a margin from -{MOST_MARGIN:g} to {MOST_MARGIN:g}, got {self.margin}",
                parameter="promote_if",
            )


def check_inputs(decides: bool, own_data: bool, hold_out: int) -> None:
    """Raise InvalidParameter unless a rule has one source of inputs, and a data set of its own has a rule."""
    got = "both" if own_data and hold_out else "neither" if decides and not (own_data or hold_out) else None
    if got is not None:
        raise InvalidParameter(f"gate: expected a data set of its own or a share to hold out, got {got}", got=got)
    if own_data and not decides:
        raise InvalidParameter("gate: expected a rule beside its data set, got none", parameter="promote_if")


@dataclass(frozen=True)
class Comparison:
    """Both scores, and how much better the new version is: ``new`` minus ``current``, for TER the reverse."""

    new: float
    current: float
    difference: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def compared(new: Score, current: Score) -> Comparison:
    """Compare two scores of the same inputs, by the same resamples for both."""
    better, worse = (current, new) if new.lower_is_better else (new, current)
    low, high = difference_interval(better, worse)
    return Comparison(new.value, current.value, better.value - worse.value, low, high)


def verdict_of(rule: Rule, found: Comparison) -> Verdict:
    """Return whether the interval's lower bound is within the margin."""
    return "promoted" if found.low >= -rule.margin else "rejected"


def reason_of(rule: Rule, found: Comparison, inputs: int) -> str:
    """Say in a line what the verdict follows from."""
    side = "at least" if verdict_of(rule, found) == "promoted" else "below"
    return (
        f"{rule.metric} {found.new:.2f} against {found.current:.2f} over {inputs} inputs: {found.difference:+.2f}, "
        f"and its lower bound {found.low:+.2f} is {side} {-rule.margin:+g}"
    )


def after_moves(outcome: Mapping[str, Any], moves: int) -> Mapping[str, Any]:
    """Return what becomes of a gate's outcome, JSON values, when the alias has moved so often meanwhile."""
    if moves < MOST_MOVES:
        return outcome
    reason = f"the alias moved {moves} times while versions were scored"
    return {**outcome, "verdict": "undecided", "reason": reason}
