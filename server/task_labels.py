"""Which tasks have a label of their own in the metrics: a bounded number, those that are used most, shared by tenants.

Owns the choice. A task that is used takes a free place, else that of a task which nobody uses any more, else one of
the tenant that has the most of them, else that of a task of its tenant which is used less. So neither who came first
nor who has the most tasks keeps the others out, and a task that is used once pushes out none. Knows no metric.
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
"""How many uses a task must be ahead of the one whose place it takes, so that two of a kind do not take turns."""
REMEMBERED: Final = 4
"""Tasks without a label whose use is remembered, for each that has one."""


class TaskLabels:
    """The bare backbone, None, always has its label, beside ``most`` tasks, which are named ``tenant/name``."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._began = clock()
        self._labelled: set[str] = set()
        self._uses: dict[str, float] = {}  # in units that double with every half-life: comparing needs no decay

    def label(self, task: str | None) -> str:
        """The label under which ``task`` counts now."""
        if task is None:
            return BARE
        if task not in self._labelled:
            if len(self._labelled) >= self._most:
                return OTHER
            self._labelled.add(task)
        return task

    def used(self, task: str | None) -> str | None:
        """Count a use. Return the label that gave its place to ``task``, if one did."""
        if task is None:
            return None
        unit = self._unit()
        self._uses[task] = self._uses.get(task, 0.0) + unit
        if self.label(task) != OTHER:
            return None
        given = self._place_for(task, unit)
        if given is not None:
            self._labelled.remove(given)
            self._labelled.add(task)
        self._forget()
        return given

    def _unit(self) -> float:
        half_lives = (self._clock() - self._began) / HALF_LIFE_S
        if half_lives > 100:  # long before a float overflows
            whole = int(half_lives)
            self._began += whole * HALF_LIFE_S
            self._uses = {task: uses * 2.0**-whole for task, uses in self._uses.items()}
            half_lives -= whole
        return float(2.0**half_lives)

    def _place_for(self, task: str, unit: float) -> str | None:
        least = min(self._labelled, key=self._use)
        if self._use(least) < IDLE * unit:
            return least
        tenant, held = _tenant(task), Counter(map(_tenant, self._labelled))
        own, largest = held[tenant], max(held.values())
        if largest > own + 1:
            return min((label for label in self._labelled if held[_tenant(label)] == largest), key=self._use)
        rivals = (label for label in self._labelled if _tenant(label) == tenant or held[_tenant(label)] > own)
        least = min(rivals, key=self._use)
        return least if self._uses[task] >= self._use(least) + AHEAD * unit else None

    def _use(self, task: str) -> float:
        return self._uses.get(task, 0.0)

    def _forget(self) -> None:
        without = [task for task in self._uses if task not in self._labelled]
        if len(without) > REMEMBERED * self._most:
            for task in sorted(without, key=self._use)[: len(without) // 2]:
                del self._uses[task]


def _tenant(task: str) -> str:
    return task.partition("/")[0]
