"""Which tasks or tenants have a label of their own in the metrics: a bounded number, those that are used most.

Owns the choice. A name that is used takes a free place, else that of one which nobody uses any more, else one of the
tenant that has the most of them, else that of one of its tenant which is used less. So neither who came first nor who
has the most tasks keeps the others out, and a name that is used once pushes out none. Knows no metric.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

BARE: Final = "(bare)"
OTHER: Final = "(other)"
HALF_LIFE_S: Final = 600.0
"""A use counts half after so long."""
IDLE: Final = 0.1
"""A label with less use than this is anybody's."""
AHEAD: Final = 2.0
"""How many uses a name must be ahead of the one whose place it takes, so that two of a kind do not take turns."""
REMEMBERED: Final = 4
"""Names without a label of which something is remembered, for each that has one."""


class Labels:
    """At most ``most`` names, a task's ``tenant/name`` or a tenant's. None is the bare backbone: it has its label."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._clock = most, clock
        self._began = clock()
        self._labelled: set[str] = set()
        self._uses: dict[str, float] = {}  # in units that double with every half-life: comparing needs no decay

    def label(self, name: str | None) -> str:
        """The label under which ``name`` counts now."""
        if name is None:
            return BARE
        if name not in self._labelled:
            if len(self._labelled) >= self.most:
                return OTHER
            self._labelled.add(name)
        return name

    def used(self, name: str | None) -> str | None:
        """Count a use. Return the label that gave its place to ``name``, if one did."""
        if name is None:
            return None
        unit = self._unit()
        self._uses[name] = self._uses.get(name, 0.0) + unit
        if self.label(name) != OTHER:
            return None
        given = self._place_for(name, unit)
        if given is not None:
            self._labelled.remove(given)
            self._labelled.add(name)
        self._forget()
        return given

    def _unit(self) -> float:
        half_lives = (self._clock() - self._began) / HALF_LIFE_S
        if half_lives > 100:  # long before a float overflows
            whole = int(half_lives)
            self._began += whole * HALF_LIFE_S
            self._uses = {name: uses * 2.0**-whole for name, uses in self._uses.items()}
            half_lives -= whole
        return float(2.0**half_lives)

    def _place_for(self, name: str, unit: float) -> str | None:
        least = min(self._labelled, key=self._use)
        if self._use(least) < IDLE * unit:
            return least
        tenant, held = _tenant(name), Counter(map(_tenant, self._labelled))
        own, largest = held[tenant], max(held.values())
        if largest > own + 1:
            return min((label for label in self._labelled if held[_tenant(label)] == largest), key=self._use)
        rivals = (label for label in self._labelled if _tenant(label) == tenant or held[_tenant(label)] > own)
        least = min(rivals, key=self._use)
        return least if self._uses[name] >= self._use(least) + AHEAD * unit else None

    def _use(self, name: str) -> float:
        return self._uses.get(name, 0.0)

    def _forget(self) -> None:
        without = [name for name in self._uses if name not in self._labelled]
        if len(without) > REMEMBERED * self.most:
            for name in sorted(without, key=self._use)[: len(without) // 2]:
                del self._uses[name]


def _tenant(name: str) -> str:
    return name.partition("/")[0]
