"""Turns: a few reads of the registry at a time, shared fairly between the tenants that ask.

Owns whose read comes next: the tenants that wait take turns, and no tenant has all reads at once. So names that nobody
has, asked for by one tenant, keep no other from finding its tasks. Knows no task and no thread; for one event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefixes.errors import RegistryUnavailable


class Turns:
    """``most`` turns at once, ``most_each`` of one tenant; ``most_waiting`` of a tenant wait for theirs."""

    def __init__(self, most: int, most_each: int, most_waiting: int) -> None:
        self._free, self._most_each, self._most_waiting = most, most_each, most_waiting
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the tenant whose turn is next comes first

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn of ``tenant`` and hold it. Raises RegistryUnavailable where too many wait already."""
        waiting = self._waiting.setdefault(tenant, deque())
        if len(waiting) >= self._most_waiting:
            raise RegistryUnavailable(
                f"registry: expected at most {self._most_waiting} look-ups that wait, got one more; ask again"
            )
        mine = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        self._give()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._end(tenant)
            raise
        try:
            yield
        finally:
            self._end(tenant)

    def _end(self, tenant: str) -> None:
        self._free += 1
        self._running[tenant] -= 1
        self._give()

    def _give(self) -> None:
        """Give every free turn to whoever is next."""
        while self._free:
            for tenant, waiting in self._waiting.items():
                while waiting and waiting[0].cancelled():
                    waiting.popleft()
                if waiting and self._running[tenant] < self._most_each:
                    break
            else:
                break
            waiting.popleft().set_result(None)
            self._waiting[tenant] = self._waiting.pop(tenant)
            self._running[tenant] += 1
            self._free -= 1
        for tenant in [tenant for tenant, waiting in self._waiting.items() if not waiting]:
            del self._waiting[tenant]
        self._running += Counter()  # drops the zeros
