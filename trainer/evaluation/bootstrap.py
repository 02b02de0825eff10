"""Bootstrap intervals of scores: draws inputs with replacement, the same draws for every score.

Owns the draws; knows no metric. Two versions with the same inputs and seed get the same draws, so that the difference
of their scores can be judged pair by pair (Koehn 2004).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from trainer.evaluation.scores.base import Floats, Score

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95
_AT_ONCE: Final = 1 << 22  # counts in memory at a time


def intervals(
    scores: Sequence[Score], *, seed: int, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> dict[str, tuple[float, float] | None]:
    """Return the percentile interval of each score by name.

    It is None for a score that is no function of sums over inputs, for fewer than two inputs, and without resamples.
    """
    summed = {score.name: score for score in scores if score.statistics is not None and score.of_sums is not None}
    inputs = {len(score.statistics) for score in summed.values() if score.statistics is not None}
    assert len(inputs) <= 1, "the scores are of one corpus"
    found: dict[str, tuple[float, float] | None] = {score.name: None for score in scores}
    count = inputs.pop() if inputs else 0
    if count < 2 or resamples < 1:
        return found
    parts: dict[str, list[Floats]] = {name: [] for name in summed}
    for counts in _draws(count, seed, resamples):
        for name, score in summed.items():
            parts[name].append(_resampled(score, counts))
    for name, values in parts.items():
        found[name] = _interval(values, confidence)
    return found


def difference_interval(
    new: Score, current: Score, *, seed: int = 1, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the percentile interval of ``new`` minus ``current``, two scores of the same inputs in the same order.

    Both must be functions of sums over inputs.
    """
    assert new.statistics is not None and current.statistics is not None
    count = len(new.statistics)
    assert count == len(current.statistics) >= 2, "paired: two scores of the same inputs"
    draws = _draws(count, seed, resamples)
    return _interval([_resampled(new, counts) - _resampled(current, counts) for counts in draws], confidence)


def _draws(count: int, seed: int, resamples: int) -> Iterator[Floats]:
    """How often each input is drawn ``(some resamples, count)``, all resamples one part after the other."""
    random = np.random.default_rng(seed)
    share, step = np.full(count, 1 / count), max(1, _AT_ONCE // count)
    for start in range(0, resamples, step):
        yield random.multinomial(count, share, size=min(step, resamples - start)).astype(np.float64)


def _resampled(score: Score, counts: Floats) -> Floats:
    assert score.statistics is not None and score.of_sums is not None
    return score.of_sums(counts @ score.statistics)


def _interval(values: Sequence[Floats], confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(values), [tail, 100 - tail])
    return float(low), float(high)
