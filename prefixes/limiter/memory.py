"""MemoryLimiter: the limiter of one process. Owns its counters and reservations, behind one lock.

Counters that say nothing more, such as those of keys that are gone, are forgotten now and then.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from prefixes.limiter.base import Charge, Refused, Taken, Window, field_of
from prefixes.limiter.windows import Bucket, Count, Held, period_of

SWEEP_AT: Final = 64
"""A tenant's counters are swept when there are so many, and then at twice what was left."""


@dataclass
class _Reservation:
    expires_at: float
    held: list[tuple[Charge, Bucket | Count, Held]]


@dataclass
class _Tenant:
    counters: dict[str, Bucket | Count] = field(default_factory=dict)
    reserved: dict[str, _Reservation] = field(default_factory=dict)
    earliest: float = math.inf  # no reservation expires before
    sweep_at: int = SWEEP_AT

    def reserve(self, reservation_id: str, reservation: _Reservation) -> None:
        self.reserved[reservation_id] = reservation
        self.earliest = min(self.earliest, reservation.expires_at)

    def expire(self, now: float) -> None:
        """Let what has expired give everything back."""
        if now < self.earliest:
            return
        for reservation_id in [name for name, one in self.reserved.items() if one.expires_at <= now]:
            for _, counter, held in self.reserved.pop(reservation_id).held:
                counter.settle(held, 0, now)
        self.earliest = min((one.expires_at for one in self.reserved.values()), default=math.inf)

    def sweep(self, now: float) -> None:
        """Forget the counters that say nothing more, once there are many new ones: each pays for one look or two."""
        if len(self.counters) >= self.sweep_at:
            self.counters = {name: one for name, one in self.counters.items() if not one.is_spent(now)}
            self.sweep_at = max(SWEEP_AT, 2 * len(self.counters))


class MemoryLimiter:
    """See ``base.Limiter``. ``clock`` gives the seconds since 1970."""

    remote = False

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tenants: dict[str, _Tenant] = {}

    def count_from(self, tenant: str, key: str | None, counter: str, window: Window, used: int) -> None:
        """Let this day's or month's counter stand at ``used``: what an earlier process has counted."""
        with self._lock:
            known, now = self._known(tenant)
            period, _ = period_of(window, now)
            known.counters[field_of(key, counter, window)] = Count(window, period, used)

    def take(self, tenant: str, reservation_id: str, charges: Sequence[Charge], ttl_s: float) -> Taken | Refused:
        with self._lock:
            known, now = self._known(tenant)
            known.sweep(now)
            pairs = [(charge, _counter(known, charge, now)) for charge in charges]
            states = tuple(counter.state(charge, now) for charge, counter in pairs)
            if reservation_id not in known.reserved:
                if any(state.wait_s for state in states):
                    return Refused(states)
                held = [(charge, counter, counter.take(charge, now)) for charge, counter in pairs]
                known.reserve(reservation_id, _Reservation(now + ttl_s, held))
            return Taken(tuple(replace(counter.state(charge, now), wait_s=0.0) for charge, counter in pairs))

    def settle(self, tenant: str, reservation_id: str, used: Mapping[str, int]) -> None:
        with self._lock:
            known, now = self._known(tenant)
            found = known.reserved.pop(reservation_id, None)
            for charge, counter, held in found.held if found else ():
                counter.settle(held, used.get(charge.counter, held.amount), now)

    def renew(self, tenant: str, reservation_ids: Sequence[str], ttl_s: float) -> None:
        with self._lock:
            known, now = self._known(tenant)
            for reservation_id in reservation_ids:
                if found := known.reserved.get(reservation_id):
                    found.expires_at = now + ttl_s

    def close(self) -> None:
        """There is nothing to close."""

    def _known(self, tenant: str) -> tuple[_Tenant, float]:
        known, now = self._tenants.setdefault(tenant, _Tenant()), self._clock()
        known.expire(now)
        return known, now


def _counter(known: _Tenant, charge: Charge, now: float) -> Bucket | Count:
    if charge.field not in known.counters:
        known.counters[charge.field] = Bucket(now) if charge.window is Window.MINUTE else Count(charge.window)
    return known.counters[charge.field]
