"""One tenant's waiting groups that may be admitted: a lane for each of its keys, and the keys' turns. Torch-free.

Owns the order inside a tenant. Keys take turns, one admission each; a key's own groups stay in order of arrival. Knows
neither counters nor blocks.

A key whose head is over the key's own limit of rows waits for its own rows, and its turn comes once they end. One whose
head lacks rows of the *tenant's* limit would wait for rows that other keys may take again and again: when ``PASSES`` of
them have passed it, it *reserves*, and no other key of the tenant goes before it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from operator import itemgetter
from typing import Final

from server.engine.row import Group
from server.engine.scheduling.running_rows import HeldBy, RunningRows

PASSES: Final = 8
"""Groups that may pass a tenant, or a key inside a tenant, whose head does not fit."""

Arrival = tuple[float, int]
_ARRIVAL = itemgetter(0)


class _Lane:
    """One key's groups that may be admitted, in order of arrival."""

    def __init__(self) -> None:
        self.waiting = 0  # groups of the key that wait, also those whose prefix loads
        self.passed = 0  # groups of other keys that passed its head, which lacked rows of the tenant's limit
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
        assert groups[place][1] is group, "the group is not in its key's lane"
        del groups[place]


class TenantQueue:
    """One tenant's lanes. The first of them has the next turn."""

    def __init__(self) -> None:
        self.passed = 0  # groups that passed the tenant, whose turn it was, since it was last behind others
        self.waiting = 0  # all groups of the tenant that wait, also those whose prefix loads
        self._lanes: dict[str | None, _Lane] = {}  # of each key that has a group here, loading or not

    def __bool__(self) -> bool:
        return any(self._lanes.values())

    def __iter__(self) -> Iterator[Group]:
        return (group for lane in self._lanes.values() for group in lane)

    def count(self, key: str) -> int:
        """Groups of ``key`` that wait. Any thread may call it."""
        lane = self._lanes.get(key)
        return 0 if lane is None else lane.waiting

    @property
    def arrival(self) -> Arrival:
        """When the head of the first lane arrived. There must be one."""
        return next(lane for lane in self._lanes.values() if lane).first[0]

    def head(self, rows: RunningRows) -> Group | None:
        """The group whose turn it is, of those that may run beside the ``rows`` that do; None if there is none."""
        for lane in self._lanes.values():
            if lane:
                group = lane.first[1]
                held_by = rows.holds_back(group.request)
                if held_by is None:
                    return group
                if held_by is HeldBy.TENANT and lane.passed >= PASSES:
                    return None
        return None

    def preempted_head(self, rows: RunningRows) -> Group | None:
        """The first that may be admitted again, of those that may run beside ``rows``."""
        heads = (lane.preempted_head for lane in self._lanes.values())
        return next((group for group in heads if group and rows.holds_back(group.request) is None), None)

    def note_turn(self, group: Group, rows: RunningRows) -> None:
        """``group`` is admitted beside ``rows``: its key's next turn is behind the others'."""
        key = group.request.key
        for other, lane in self._lanes.items():
            if other == key:
                break
            if lane and rows.holds_back(lane.first[1].request) is HeldBy.TENANT:
                lane.passed += 1
        lane = self._lanes.pop(key)
        lane.passed = 0
        self._lanes[key] = lane

    def join(self, group: Group) -> None:
        """``group`` waits from now on; ``add`` says when it may be admitted."""
        self.waiting += 1
        self._lanes.setdefault(group.request.key, _Lane()).waiting += 1

    def leave(self, group: Group) -> None:
        """``group`` waits no longer. A key without any loses its turn."""
        lane = self._lanes[group.request.key]
        self.waiting -= 1
        lane.waiting -= 1
        if not lane.waiting:
            del self._lanes[group.request.key]

    def add(self, group: Group, arrival: Arrival) -> None:
        """``group`` may be admitted."""
        self._lanes[group.request.key].add(group, arrival)

    def remove(self, group: Group, arrival: Arrival) -> None:
        """``group`` may not be admitted any more."""
        self._lanes[group.request.key].remove(group, arrival)
