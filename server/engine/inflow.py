"""How many requests may wait, of all tenants together and of each, and those on their way to the engine's thread.

Owns the two bounds and the counts of what was submitted and has not been taken yet. Knows no queue and no thread; any
thread may call it.
"""

from __future__ import annotations

import threading
from collections import Counter

from prefixes.errors import QueueFull


class Inflow:
    """``most`` requests may wait, and of them ``most_per_tenant`` of one caller; None is no bound of its own."""

    def __init__(self, most: int, most_per_tenant: int | None = None) -> None:
        self._most, self._most_per_tenant = most, most_per_tenant
        self._on_their_way = Counter[str]()  # by caller
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return self._on_their_way.total()

    def check(self, caller: str, waiting: int, of_caller: int) -> None:
        """Raise QueueFull unless one more may wait where so many do in the engine, and so many of ``caller``."""
        with self._lock:
            waiting, of_caller = waiting + self._on_their_way.total(), of_caller + self._on_their_way[caller]
        _require(waiting, self._most, "waiting requests")
        if self._most_per_tenant is not None:
            what = f"waiting requests of tenant {caller!r} (max_waiting_per_tenant)"
            _require(of_caller, self._most_per_tenant, what)

    def submitted(self, caller: str) -> None:
        """One of ``caller`` is on its way."""
        with self._lock:
            self._on_their_way[caller] += 1

    def taken(self, caller: str) -> None:
        """The engine's thread has it."""
        with self._lock:
            self._on_their_way[caller] -= 1
            if not self._on_their_way[caller]:
                del self._on_their_way[caller]


def _require(waiting: int, most: int, what: str) -> None:
    if waiting >= most:
        raise QueueFull(
            f"queue: expected at most {most} {what}, there are {waiting}", expected=most, got=waiting, retry_after_s=1
        )
