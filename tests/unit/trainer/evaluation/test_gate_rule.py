"""The gate's rule: what it decides follows from both versions' scores of the same inputs, and from the margin alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixes.errors import InvalidParameter
from trainer.evaluation.bootstrap import RESAMPLES
from trainer.evaluation.gate_rule import METRIC_OF, Rule, compared, reason_of, verdict_of
from trainer.evaluation.scores.base import Corpus, Score, mean_score
from trainer.evaluation.scores.presets import METRICS, NEED_JAVA, preset_of, scores_of

VALUES = st.floats(0, 100, width=32)
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=60)
MARGINS = st.floats(-50, 50, width=32)


def scores(pairs: Sequence[tuple[float, float]]) -> tuple[Score, Score]:
    new, current = zip(*pairs, strict=True)
    return mean_score("bleu", new), mean_score("bleu", current)


def quantile(values: list[float], share: float) -> float:
    """Between the two nearest of the sorted values."""
    ordered, place = sorted(values), share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@given(PAIRS)
def test_the_interval_is_that_of_plain_loops_over_the_same_resamples(pairs: list[tuple[float, float]]) -> None:
    found = compared(*scores(pairs))
    draws = np.random.default_rng(1).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=RESAMPLES)
    differences = []
    for draw in draws.tolist():
        total = 0.0
        for (new, current), count in zip(pairs, draw, strict=True):
            total += count * (new - current)
        differences.append(total / len(pairs))
    assert found.low == pytest.approx(quantile(differences, 0.025), abs=1e-9)
    assert found.high == pytest.approx(quantile(differences, 0.975), abs=1e-9)
    assert found.difference == pytest.approx(sum(new - current for new, current in pairs) / len(pairs), abs=1e-9)


@given(PAIRS)
def test_the_two_versions_change_places_with_their_signs(pairs: list[tuple[float, float]]) -> None:
    one, other = compared(*scores(pairs)), compared(*scores([(current, new) for new, current in pairs]))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
    assert one.difference == pytest.approx(-other.difference, abs=1e-9)


@given(PAIRS, MARGINS, MARGINS)
def test_who_passes_passes_with_every_larger_margin_and_the_bound_alone_decides(
    pairs: list[tuple[float, float]], one: float, other: float
) -> None:
    found, (small, large) = compared(*scores(pairs)), sorted((one, other))
    verdicts = [verdict_of(Rule("bleu", margin), found) for margin in (small, large)]
    assert verdicts in (["promoted"] * 2, ["rejected"] * 2, ["rejected", "promoted"])
    assert verdicts[0] == ("promoted" if found.low + small >= 0 else "rejected")


@given(st.lists(VALUES, min_size=2, max_size=60), st.integers(-20, 20))
def test_a_version_that_is_better_by_the_same_on_every_input_leaves_no_doubt(values: list[float], more: int) -> None:
    found = compared(*scores([(value + more, value) for value in values]))
    assert (found.low, found.high) == pytest.approx((more, more), abs=1e-9)
    assert verdict_of(Rule("bleu", 0.5 - more), found) == "promoted"
    assert verdict_of(Rule("bleu", -0.5 - more), found) == "rejected"


def test_a_version_beside_itself_is_promoted_without_a_margin_and_not_when_more_is_asked_for() -> None:
    found = compared(*scores([(float(n), float(n)) for n in range(60)]))
    assert (found.low, found.difference, found.high) == (0, 0, 0)
    assert verdict_of(Rule("bleu"), found) == "promoted"
    assert verdict_of(Rule("bleu", -0.1), found) == "rejected"


def test_of_edits_fewer_are_better() -> None:
    texts = [f"place {n} has food and a view of the river {n}" for n in range(60)]
    good, bad = Corpus.of(texts, [[text] for text in texts]), Corpus.of(["it is"] * 60, [[text] for text in texts])
    for name, metric in METRIC_OF.items():
        if metric in NEED_JAVA:
            continue
        best, worst = (
            next(score for score in scores_of(corpus, preset_of("plain"), [metric]) if score.name == name)
            for corpus in (good, bad)
        )
        assert (best.value < worst.value) == (name == "ter"), name
        assert verdict_of(Rule(name), compared(best, worst)) == "promoted", name
        assert verdict_of(Rule(name), compared(worst, best)) == "rejected", name


def test_every_score_of_a_rule_is_one_of_an_evaluation() -> None:
    assert set(METRIC_OF.values()) == set(METRICS) - {"nist", "cider"}


@pytest.mark.parametrize(
    ("metric", "margin"), [("nist", 0.0), ("rouge", 0.0), ("bleu", float("nan")), ("bleu", 1e9), ("bleu", -1e9)]
)
def test_a_rule_that_cannot_decide_is_refused(metric: str, margin: float) -> None:
    with pytest.raises(InvalidParameter, match="promote_if: expected"):
        Rule(metric, margin)


def test_the_reason_says_both_scores_and_the_bound_in_a_line_of_ascii() -> None:
    found = compared(*scores([(60.0, 62.0)] * 80))
    assert reason_of(Rule("bleu", 0.5), found, 80) == (
        "bleu 60.00 against 62.00 over 80 inputs: -2.00, and its lower bound -2.00 is below -0.5"
    )
