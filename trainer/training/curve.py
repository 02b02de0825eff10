"""What more examples would bring: an estimate from training on a quarter, a half and all of them, at equal steps.

Owns the arithmetic and when nothing can be said. Knows no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

LEAST_EXAMPLES: Final = 40
LEAST_HELD_OUT: Final = 20  # fewer make a loss by chance


def unsaid(reason: str) -> dict[str, Any]:
    """No estimate, and why."""
    return {"estimate": None, "reason": reason}


def doubled(points: Sequence[tuple[int, float]]) -> Mapping[str, Any]:
    """The held-out loss with twice the examples, between two bounds, from ``(examples, loss)`` at n/4, n/2 and n.

    One bound lets the next doubling gain what the last one did, as a line over the logarithm of the examples. The other
    lets the gains go on shrinking, or growing, by the ratio of the two that were measured, as a power law does. The
    bounds are of these two models; they hold no chance of the draw. Where a doubling did not help nothing is said.
    """
    (_, quarter), (_, half), (count, whole) = points
    first, second = quarter - half, half - whole
    if first <= 0 or second <= 0:
        return unsaid("more examples did not lower the loss at every doubling") | {"points": [list(p) for p in points]}
    gains = sorted((second, min(second * second / first, first)))
    return {
        "estimate": whole - sum(gains) / 2,
        "low": whole - gains[1],
        "high": whole - gains[0],
        "examples": 2 * count,
        "points": [list(point) for point in points],
    }
