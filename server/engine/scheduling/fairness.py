"""How much service each tenant has had, so that the one with the least goes next. Torch-free.

Virtual token counters: Sheng et al. 2024, "Fairness in Serving Large Language Models". A tenant's counter grows with
each token that is computed for it, over its weight: an input's by 1 at admission, an output's by 2 when it is chosen.

A tenant that was not waiting has not been held up, so it may save up nothing: when it begins to wait it is lifted to
the least counter of the others that wait. If nobody else waits, to that of the tenant that was admitted last.

Owns the counters and what a token counts. Knows neither queues nor groups, and no tenant but its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

INPUT_WEIGHT: Final = 1.0
OUTPUT_WEIGHT: Final = 2.0
KEPT: Final = 4096
"""Counters of tenants that do not wait that are kept. Beyond, those with the least lose theirs."""


class TokenCounters:
    """One counter for each tenant. The engine's thread alone calls it."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        """``weight_of`` gives a tenant's weight, above 0; it is asked at each charge."""
        self._weight_of = weight_of
        self._counters: dict[str, float] = {}
        self._level = 0.0  # of the latest lift: it never falls, so that a forgotten counter at or below it is no loss
        self._last: str | None = None  # admitted last

    def of(self, tenant: str) -> float:
        """The tenant's counter; of one that is not known, what it would begin with."""
        return self._counters.get(tenant, self._level)

    def lift(self, tenant: str, waiting: Collection[str]) -> None:
        """``tenant`` begins to wait beside the ``waiting`` ones: it has been held up by nobody until now."""
        others = [self.of(other) for other in waiting if other != tenant]
        least = min(others, default=self._level if self._last is None else self.of(self._last))
        self._level = max(self._level, least)
        self._counters[tenant] = max(self.of(tenant), self._level)
        if len(self._counters) > KEPT + len(waiting) + 1:
            self._forget({*waiting, tenant})

    def admitted(self, tenant: str, input_tokens: int) -> None:
        """A group of ``tenant`` is admitted, and so many tokens of its input will be computed."""
        self._last = tenant
        self._charge(tenant, INPUT_WEIGHT * input_tokens)

    def chosen(self, tenant: str, output_tokens: int) -> None:
        """So many tokens of output were chosen, all rows together."""
        self._charge(tenant, OUTPUT_WEIGHT * output_tokens)

    def __len__(self) -> int:
        return len(self._counters)

    def _charge(self, tenant: str, cost: float) -> None:
        self._counters[tenant] = self.of(tenant) + cost / self._weight_of(tenant)

    def _forget(self, waiting: Collection[str]) -> None:
        """Forget half of the counters of tenants that do not wait, the least first: a lift takes most of them anyway.

        A tenant whose counter was above the level loses what it was ahead of others.
        """
        gone = sorted((tenant for tenant in self._counters if tenant not in waiting), key=self.of)
        for tenant in gone[: len(gone) // 2]:
            del self._counters[tenant]
