"""Whose kept content yields when room is needed: no tenant pushes out what the others keep. Torch-free.

A tenant *keeps* what stays only so that it need not be computed or loaded again: prompts that nobody uses now, and the
prefixes of its tasks, in use or not, but no pinned ones. Of these, what nobody uses is *idle* and can yield.

- The tenant that keeps the most for its weight yields first, of those that have something idle. So a tenant loses
  nothing while another one keeps more and has something idle. What comes in counts as kept before room is made for it.
- That protects tenants that are *active*: whose content was used within ``ACTIVE_S``. What all others have goes first,
  that of the tenant that was active longest ago before the rest.

Owns the counts and this choice. Knows neither blocks nor bytes: whoever keeps counts in a unit of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container
from enum import Enum, auto
from typing import Final

from server.engine.config import equal_weight

ACTIVE_S: Final = 600.0
"""Seconds since the last use of its content for which a tenant is active."""


class Kept(Enum):
    """What is kept."""

    PROMPTS = auto()
    PREFIXES = auto()


class Shares:
    """What each tenant keeps. One thread calls it."""

    def __init__(
        self, weight_of: Callable[[str], float] = equal_weight, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._weight_of, self._clock = weight_of, clock
        self._kept = {kind: Counter[str]() for kind in Kept}
        self._idle = {kind: Counter[str]() for kind in Kept}
        self._over: dict[str, float] = {}  # kept over weight, of tenants with something idle; last active ones last
        self._used_at: dict[str, float] = {}  # of the same

    def used(self, kind: Kept, tenant: str, kept: int, idle: int) -> None:
        """By its use, ``tenant`` keeps so much more or less, and so much more or less of it is idle."""
        self._change(kind, tenant, kept, idle)
        if tenant in self._over:
            self._over[tenant] = self._over.pop(tenant)
            self._used_at[tenant] = self._clock()

    def gone(self, kind: Kept, tenant: str, idle: int) -> None:
        """So much of ``tenant``'s idle content is kept no longer."""
        self._change(kind, tenant, -idle, -idle)

    def forget(self, kind: Kept) -> None:
        """Nobody keeps anything of ``kind``."""
        for tenant, kept in list(self._kept[kind].items()):
            self._change(kind, tenant, -kept, -self._idle[kind][tenant])

    def in_use(self, kind: Kept, tenant: str) -> int:
        """What is kept and not idle."""
        return self._kept[kind][tenant] - self._idle[kind][tenant]

    def idle(self, kind: Kept, tenant: str) -> int:
        """What could yield."""
        return self._idle[kind][tenant]

    def first_to_yield(self, among: Container[str] | None = None) -> str:
        """The tenant whose idle content yields next, ``among`` some. There must be one."""
        names = self._over if among is None else [tenant for tenant in self._over if tenant in among]
        first = next(iter(names))
        return max(names, key=self._over.__getitem__) if self._active(first) else first

    def yielding_to(self, tenant: str, more: int, kinds: tuple[Kept, ...] = tuple(Kept)) -> float:
        """How much others would yield if ``tenant`` kept so much ``more``, and none would then keep less than it does.

        By their weights; inactive tenants give all that is idle.
        """
        level, room = self._level(tenant, more), 0.0
        for other in self._over:
            if other != tenant:
                idle = sum(self._idle[kind][other] for kind in kinds)
                above = self._kept_by(other) - level * self._weight_of(other)
                room += max(0.0, min(idle, above)) if self._active(other) else idle
        return room

    def outdone(self, tenant: str, more: int) -> bool:
        """Whether another one keeps more than ``tenant`` would with so much ``more``, and has prefixes in use."""
        level, kind = self._level(tenant, more), Kept.PREFIXES
        return any(
            other != tenant and self.in_use(kind, other) > 0 and self._level(other, 0) > level
            for other in self._kept[kind]
        )

    def _level(self, tenant: str, more: int) -> float:
        return (self._kept_by(tenant) + more) / self._weight_of(tenant)

    def _active(self, tenant: str) -> bool:
        return self._clock() - self._used_at[tenant] <= ACTIVE_S

    def _kept_by(self, tenant: str) -> int:
        return sum(kept[tenant] for kept in self._kept.values())

    def _change(self, kind: Kept, tenant: str, kept: int, idle: int) -> None:
        for counts, more in ((self._kept[kind], kept), (self._idle[kind], idle)):
            counts[tenant] += more
            if not counts[tenant]:
                del counts[tenant]
        if any(tenant in counts for counts in self._idle.values()):
            self._over[tenant] = self._level(tenant, 0)
            self._used_at.setdefault(tenant, self._clock())
        else:
            self._over.pop(tenant, None)
            self._used_at.pop(tenant, None)
