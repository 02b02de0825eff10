"""Waiting groups: a queue for each tenant, in order of arrival, and those whose prefix loads. Torch-free.

Owns the queues and whose turn it is: the tenant's with the least counter (``fairness``). A tenant is lifted when its
queue was empty. A step's questions cost the same however many groups a tenant has: it looks only at the heads, and
finds groups whose prefix loads by key. Knows neither blocks nor why a group waits.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter

from server.engine.row import Group
from server.engine.scheduling.fairness import TokenCounters
from server.engine.types import PrefixKey

Arrival = tuple[float, int]
_ARRIVAL = itemgetter(0)


class TenantQueue:
    """One tenant's groups that may be admitted, in order of arrival."""

    def __init__(self) -> None:
        self.passed = 0  # groups that passed the tenant, whose turn it was, since it was last behind others
        self._groups: dict[bool, list[tuple[Arrival, Group]]] = {False: [], True: []}  # by ``Group.admitted``

    def __bool__(self) -> bool:
        return any(self._groups.values())

    def __iter__(self) -> Iterator[Group]:
        return (group for groups in self._groups.values() for _, group in groups)

    @property
    def first(self) -> tuple[Arrival, Group]:
        """The first of all, with its arrival. There must be one."""
        return min((groups[0] for groups in self._groups.values() if groups), key=_ARRIVAL)

    @property
    def head(self) -> Group:
        """The first of all. There must be one."""
        return self.first[1]

    @property
    def preempted_head(self) -> Group | None:
        """The first of those that may be admitted again: they ran and were preempted."""
        return self._groups[True][0][1] if self._groups[True] else None

    def add(self, group: Group, arrival: Arrival) -> None:
        """Add a group at its place."""
        bisect.insort(self._groups[group.admitted], (arrival, group), key=_ARRIVAL)

    def remove(self, group: Group, arrival: Arrival) -> None:
        """Remove a group that is here."""
        groups = self._groups[group.admitted]
        place = bisect.bisect_left(groups, arrival, key=_ARRIVAL)
        assert groups[place][1] is group, "the group is not in its tenant's queue"
        del groups[place]


class WaitingGroups:
    """The queues. ``len`` counts all groups; iteration gives all in order of arrival."""

    def __init__(self, counters: TokenCounters) -> None:
        self._counters = counters
        self._queues: dict[str, TenantQueue] = {}  # of each caller that has a group here, loading or not
        self._ready: dict[str, TenantQueue] = {}  # of those, the ones that are not empty
        self._loading: dict[PrefixKey, dict[Group, None]] = {}
        self._numbers: dict[Group, int] = {}  # of all that wait, in the order of adding: two may arrive at one time
        self._next_number = 0
        self._waiting = Counter[str]()  # all groups, by caller

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Group]:
        return iter(sorted(self._numbers, key=self._arrival))

    def count(self, caller: str) -> int:
        """Groups of ``caller``. Any thread may call it."""
        return self._waiting.get(caller, 0)

    def counts(self) -> dict[str, int]:
        """Groups of each caller that has some. Any thread may call it."""
        return dict(self._waiting)

    def in_turn(self) -> list[TenantQueue]:
        """The tenants' queues that are not empty: the least counter first, then by the arrival of their heads."""
        if len(self._ready) < 2:
            return list(self._ready.values())
        order = sorted(self._ready, key=lambda tenant: (self._counters.of(tenant), self._ready[tenant].first[0]))
        return [self._ready[tenant] for tenant in order]

    def note_passing(self, group: Group) -> None:
        """``group`` is admitted: it passes the tenants whose turn was earlier; those after it are behind its own."""
        own, before = self._queues[group.request.caller], True
        for queue in self.in_turn():
            if queue is own:
                before = False
            else:
                queue.passed = queue.passed + 1 if before else 0

    def add(self, group: Group, *, loading: bool) -> None:
        """Add a group; with ``loading`` it first waits for its prefix."""
        self._numbers[group] = self._next_number
        self._next_number += 1
        self._waiting[group.request.caller] += 1
        self._queues.setdefault(group.request.caller, TenantQueue())
        self._insert(group, loading)

    def remove(self, group: Group) -> None:
        """Remove a waiting group."""
        if not self._take_from_loading(group):
            self._take_from_ready(group)
        del self._numbers[group]
        caller = group.request.caller
        self._waiting[caller] -= 1
        if not self._waiting[caller]:
            del self._waiting[caller], self._queues[caller]

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
        ready = (group for queue in self._ready.values() for group in queue)
        return [*self._loading.get(key, ()), *(group for group in ready if group.request.prefix == key)]

    def _arrival(self, group: Group) -> Arrival:
        return group.submitted_at, self._numbers[group]

    def _insert(self, group: Group, loading: bool) -> None:
        caller = group.request.caller
        if loading:
            assert group.request.prefix is not None, "a bare group has no prefix to wait for"
            self._loading.setdefault(group.request.prefix, {})[group] = None
            return
        if caller not in self._ready:
            self._counters.lift(caller, self._ready)
        self._queues[caller].add(group, self._arrival(group))
        self._ready[caller] = self._queues[caller]

    def _take_from_ready(self, group: Group) -> None:
        queue = self._queues[group.request.caller]
        queue.remove(group, self._arrival(group))
        if not queue:
            del self._ready[group.request.caller]

    def _take_from_loading(self, group: Group) -> bool:
        key = group.request.prefix
        groups = self._loading.get(key) if key else None
        if key is None or groups is None or group not in groups:
            return False
        del groups[group]
        if not groups:
            del self._loading[key]
        return True
