"""Waiting groups: a queue for each tenant, and those whose prefix loads. Torch-free.

Owns the queues and whose turn it is: the tenant's with the least counter (``fairness``). A tenant is lifted when its
queue was empty. ``tenant_queue`` has the order inside a tenant. A step's questions cost the same however many groups a
tenant has: it looks only at the heads, and finds groups whose prefix loads by key. Tenants stand in the order that
their counters gave when each was last looked at. Counters only grow, so that whoever stands before its place is met
there, and put right. Knows neither blocks nor why a group waits.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from server.engine.row import Group
from server.engine.scheduling.fairness import TokenCounters
from server.engine.scheduling.running_rows import RunningRows
from server.engine.scheduling.tenant_queue import Arrival, TenantQueue
from server.engine.types import PrefixKey

_Place = tuple[float, Arrival, str]  # counter, arrival of the head, tenant


@dataclass(frozen=True)
class Turn:
    """``group`` may be admitted, although the turn was theirs: of those that it ``passes``, which do not fit, and of
    those that are ``limited`` to the rows that they have."""

    group: Group
    passes: tuple[TenantQueue, ...] = ()
    limited: tuple[TenantQueue, ...] = ()


class WaitingGroups:
    """The queues. ``len`` counts all groups; iteration gives all in order of arrival."""

    def __init__(self, counters: TokenCounters) -> None:
        self._counters = counters
        self._queues: dict[str, TenantQueue] = {}  # of each caller that has a group here, loading or not
        self._order: list[_Place] = []  # of the tenants that have a group that may be admitted
        self._places: dict[str, _Place] = {}  # the same by tenant
        self._passed: dict[TenantQueue, None] = {}  # those that were passed since they were last behind others
        self._loading: dict[PrefixKey, dict[Group, None]] = {}
        self._numbers: dict[Group, int] = {}  # of all that wait, in the order of adding: two may arrive at one time
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Group]:
        return iter(sorted(self._numbers, key=self._arrival))

    def count(self, caller: str, key: str | None = None) -> int:
        """Groups of ``caller``, or of one of its keys. Any thread may call it."""
        queue = self._queues.get(caller)
        if queue is None:
            return 0
        return queue.waiting if key is None else queue.count(key)

    def counts(self) -> dict[str, int]:
        """Groups of each caller that has some. Any thread may call it."""
        return {tenant: queue.waiting for tenant, queue in list(self._queues.items()) if queue.waiting}

    def in_turn(self) -> Iterator[TenantQueue]:
        """The tenants' queues that are not empty: the least counter first, then by the arrival of their heads.

        It goes on only where nothing has changed in between.
        """
        place = 0
        while place < len(self._order):
            counter, _, tenant = self._order[place]
            if self._counters.of(tenant) == counter:
                yield self._queues[tenant]
                place += 1
            else:
                self._put_in_place(tenant)

    def note_turn(self, turn: Turn, rows: RunningRows) -> None:
        """``turn`` is taken, beside ``rows``: it passes the tenants before it; those after it are behind its own."""
        own = self._queues[turn.group.request.caller]
        own.note_turn(turn.group, rows)
        for queue in [queue for queue in self._passed if queue not in (own, *turn.passes, *turn.limited)]:
            queue.passed = 0
            del self._passed[queue]
        for queue in turn.passes:
            queue.passed += 1
            self._passed[queue] = None

    def add(self, group: Group, *, loading: bool) -> None:
        """Add a group; with ``loading`` it first waits for its prefix."""
        self._numbers[group] = self._next_number
        self._next_number += 1
        self._queues.setdefault(group.request.caller, TenantQueue()).join(group)
        self._insert(group, loading)

    def remove(self, group: Group) -> None:
        """Remove a waiting group."""
        if not self._take_from_loading(group):
            self._take_from_ready(group)
        del self._numbers[group]
        caller = group.request.caller
        queue = self._queues[caller]
        queue.leave(group)
        if not queue.waiting:
            del self._queues[caller]
            self._passed.pop(queue, None)

    def wait_for_prefix(self, group: Group) -> None:
        """Let a group that might have been admitted wait for its prefix again: the prefix was evicted."""
        self._take_from_ready(group)
        self._insert(group, loading=True)

    def loaded(self, key: PrefixKey) -> None:
        """The groups that waited for ``key`` may be admitted now."""
        for group in self._loading.pop(key, ()):
            self._insert(group, loading=False)

    def of(self, key: PrefixKey) -> list[Group]:
        """All groups that want ``key``, loading or not. Searches the whole queue; only failures need it."""
        ready = (group for queue in self._queues.values() for group in queue)
        return [*self._loading.get(key, ()), *(group for group in ready if group.request.prefix == key)]

    def _arrival(self, group: Group) -> Arrival:
        return group.submitted_at, self._numbers[group]

    def _insert(self, group: Group, loading: bool) -> None:
        caller = group.request.caller
        if loading:
            assert group.request.prefix is not None, "a bare group has no prefix to wait for"
            self._loading.setdefault(group.request.prefix, {})[group] = None
            return
        if caller not in self._places:
            self._counters.lift(caller, self._places)
        self._queues[caller].add(group, self._arrival(group))
        self._put_in_place(caller)

    def _put_in_place(self, caller: str) -> None:
        """Let a tenant stand where its counter and its head put it now, or nowhere if its queue is empty."""
        if old := self._places.pop(caller, None):
            del self._order[bisect.bisect_left(self._order, old)]
        queue = self._queues[caller]
        if queue:
            self._places[caller] = place = self._counters.of(caller), queue.arrival, caller
            bisect.insort(self._order, place)

    def _take_from_ready(self, group: Group) -> None:
        caller = group.request.caller
        self._queues[caller].remove(group, self._arrival(group))
        self._put_in_place(caller)

    def _take_from_loading(self, group: Group) -> bool:
        key = group.request.prefix
        groups = self._loading.get(key) if key else None
        if key is None or groups is None or group not in groups:
            return False
        del groups[group]
        if not groups:
            del self._loading[key]
        return True
