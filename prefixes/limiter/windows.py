"""The arithmetic of one counter: a bucket that refills, or a count of one day or month. Knows no store and no clock.

A bucket gives back only what it has not refilled meanwhile: else a late settlement would give the same tokens twice.
Refill goes to what was taken first. How far it has come to a reservation is not known exactly, because others before it
may have given back; it is taken for as far as it can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from prefixes.limiter.base import DAY_S, MINUTE_S, TOLERANCE, Charge, State, Window


@dataclass(frozen=True)
class Held:
    """What a reservation has of one counter. ``place`` and ``behind`` are a bucket's, ``period`` is a count's."""

    amount: int
    place: float = 0.0  # what the bucket had refilled
    behind: float = 0.0  # what it has refilled and got back once all before the reservation is
    period: int = 0


@dataclass
class Bucket:
    """``debt`` is what was taken and has not come back. It refills at ``limit`` a minute, that of the last take."""

    at: float
    limit: int = 0
    debt: float = 0.0
    refilled: float = 0.0  # all in all, had it been needed
    returned: float = 0.0  # by settlements, all in all
    held: int = 0  # reservations that are not settled

    def is_spent(self, now: float) -> bool:
        """Whether a new bucket would say the same: all has come back, and nothing is left to be settled."""
        return not self.held and self.debt <= self._flow(now)

    def state(self, charge: Charge, now: float) -> State:
        debt = max(0.0, self.debt - self._flow(now))
        rate = max(charge.limit, TOLERANCE) / MINUTE_S
        over = debt + charge.amount - charge.limit
        return State(charge, math.ceil(debt - TOLERANCE), debt / rate, over / rate if over > TOLERANCE else 0.0)

    def take(self, charge: Charge, now: float) -> Held:
        self._refill(now)
        held = Held(charge.amount, self.refilled, self.refilled + self.returned + self.debt)
        self.limit = charge.limit
        self.debt += charge.amount
        self.held += 1
        return held

    def settle(self, held: Held, used: int, now: float) -> None:
        self._refill(now)
        passed = self.refilled - held.place
        reached = max(0.0, min(passed, self.refilled + self.returned - held.behind))
        more: float = used - held.amount
        if more < 0:
            more = -min(-more, max(0.0, held.amount - reached), self.debt)
            self.returned -= more
        self.debt += more
        self.held -= 1

    def _flow(self, now: float) -> float:
        return max(0.0, now - self.at) * self.limit / MINUTE_S  # a clock that was set back refills nothing

    def _refill(self, now: float) -> None:
        flow = self._flow(now)
        self.at = now
        self.refilled += flow
        self.debt = max(0.0, self.debt - flow)


@dataclass
class Count:
    """What was used in one day or month, as ``window`` says."""

    window: Window
    period: int = 0
    used: int = 0

    def is_spent(self, now: float) -> bool:
        """Whether it is of a past day or month. What is settled of that later changes nothing either."""
        return self.period < period_of(self.window, now)[0]

    def state(self, charge: Charge, now: float) -> State:
        period, ends_at = period_of(self.window, now)
        used = self.used if period == self.period else 0
        return State(charge, used, ends_at - now, ends_at - now if used + charge.amount > charge.limit else 0.0)

    def take(self, charge: Charge, now: float) -> Held:
        period, _ = period_of(self.window, now)
        self.used = charge.amount + (self.used if period == self.period else 0)
        self.period = period
        return Held(charge.amount, period=self.period)

    def settle(self, held: Held, used: int, now: float) -> None:
        if held.period == self.period:
            self.used += used - held.amount


def period_of(window: Window, now: float) -> tuple[int, float]:
    """The number of the day or month that ``now``, in seconds since 1970, is in, and when it ends."""
    if window is Window.DAY:
        day = math.floor(now / DAY_S)
        return day, (day + 1) * DAY_S
    at = datetime.fromtimestamp(now, UTC)
    month = (at.year - 1970) * 12 + at.month - 1
    year, after = divmod(month + 1, 12)
    return month, datetime(1970 + year, after + 1, 1, tzinfo=UTC).timestamp()
