"""What a unit of a model's work takes: a first guess, then what calls took. Torch-free.

Work is counted in tokens times units: a token through one layer is 1, and more where it attends to many keys. Owns the
guess, the cost of attention and the average. Knows no rows and no inputs.
"""

from __future__ import annotations

import math
from typing import Final

NOMINAL_FLOPS: Final = 1e11  # a second, for the guess: two cores of a server's CPU with wide vectors, in float32
LAYER_WEIGHTS: Final = 12  # times hidden size squared: of a layer with an MLP four times as wide
CROSS_WEIGHTS: Final = 2  # the same for one layer's cross-attention keys and values
SETTLED: Final = 1024.0  # of work in layers
SHORTEST: Final = 1e-9  # seconds that a call takes at least: a coarse clock may show none
# To as many keys as so many times the hidden size, attention takes half of a layer's time. Measured for BART base on a
# busy CPU: attention takes 11 % of the linear layers' time at 256 tokens, 51 % at 1,024.
ATTENTION_WIDTHS: Final = 3


def first_guess(hidden_size: int, weights: int = LAYER_WEIGHTS) -> float:
    """Seconds for a token in one unit with ``weights * hidden_size ** 2`` weights, on a nominal machine."""
    return 2 * weights * hidden_size**2 / NOMINAL_FLOPS


class Rate:
    """Seconds per unit of work. The first call replaces the guess; a rate that is ``fixed`` stays at it."""

    def __init__(self, guess: float, *, fixed: bool = False, settled: float = SETTLED) -> None:
        """A call of ``settled`` work counts as much as all calls before it."""
        self._per_work, self._fixed, self._settled, self._measured = guess, fixed, settled, False

    def add(self, work: float, seconds: float) -> None:
        """Note that a call took ``seconds`` for ``work``."""
        if not self._fixed:
            weight = work / (work + self._settled) if self._measured else 1.0
            self._per_work = (1 - weight) * self._per_work + weight * max(seconds, SHORTEST) / work
            self._measured = True

    def seconds(self, work: float) -> float:
        """What ``work`` is expected to take."""
        return work * self._per_work

    def within(self, seconds: float) -> float:
        """How much work fits into ``seconds``."""
        return seconds / self._per_work


def attended_work(count: int, keys: int, hidden_size: int, *, causal: bool) -> float:
    """The work of ``count`` tokens in one layer that see ``keys`` keys before their own; with ``causal`` not all of
    their own.
    """
    seen = keys + (count + 1) / 2 if causal else keys + count
    return count * (1 + seen / (ATTENTION_WIDTHS * hidden_size))


def tokens_within(work: float, keys: int, hidden_size: int) -> int:
    """The most tokens whose causal ``attended_work`` in one layer is at most ``work``."""
    width = ATTENTION_WIDTHS * hidden_size
    linear = 1 + (keys + 0.5) / width  # work = linear * count + count ** 2 / (2 * width)
    return int(2 * work / (linear + math.sqrt(linear**2 + 2 * work / width)))
