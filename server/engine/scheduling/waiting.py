"""Waiting groups, in order of arrival: those that may be admitted, and those whose prefix loads. Torch-free.

Owns the queues. A step's questions cost the same however many groups wait: it looks only at the heads, and finds groups
whose prefix loads by key. Knows neither blocks nor why a group waits.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from server.engine.row import Group
from server.engine.types import PrefixKey


class WaitingGroups:
    """The queues. ``len`` counts all groups; iteration gives all in order of arrival."""

    def __init__(self) -> None:
        self._ready: dict[bool, list[Group]] = {False: [], True: []}  # by ``Group.admitted``
        self._loading: dict[PrefixKey, dict[Group, None]] = {}
        self._numbers: dict[Group, int] = {}  # of all that wait, in the order of adding: two may arrive at one time
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Group]:
        return iter(sorted(self._numbers, key=self._arrival))

    @property
    def head(self) -> Group | None:
        """The first of those that may be admitted."""
        heads = [groups[0] for groups in self._ready.values() if groups]
        return min(heads, key=self._arrival) if heads else None

    @property
    def preempted_head(self) -> Group | None:
        """The first of those that may be admitted again: they ran and were preempted."""
        return self._ready[True][0] if self._ready[True] else None

    def add(self, group: Group, *, loading: bool) -> None:
        """Add a group; with ``loading`` it first waits for its prefix."""
        self._numbers[group] = self._next_number
        self._next_number += 1
        self._insert(group, loading)

    def remove(self, group: Group) -> None:
        """Remove a waiting group."""
        if not self._take_from_loading(group):
            self._ready[group.admitted].remove(group)
        del self._numbers[group]

    def wait_for_prefix(self, group: Group) -> None:
        """Let a group that might have been admitted wait for its prefix again: the prefix was evicted."""
        self._ready[group.admitted].remove(group)
        self._insert(group, loading=True)

    def loaded(self, key: PrefixKey) -> None:
        """The groups that waited for ``key`` may be admitted now."""
        for group in self._loading.pop(key, ()):
            self._insert(group, loading=False)

    def of(self, key: PrefixKey) -> list[Group]:
        """All groups that want ``key``, loading or not. Searches the whole queue; only failures need it."""
        ready = (group for groups in self._ready.values() for group in groups)
        return [*self._loading.get(key, ()), *(group for group in ready if group.request.prefix == key)]

    def _arrival(self, group: Group) -> tuple[float, int]:
        return group.submitted_at, self._numbers[group]

    def _insert(self, group: Group, loading: bool) -> None:
        if loading:
            assert group.request.prefix is not None, "a bare group has no prefix to wait for"
            self._loading.setdefault(group.request.prefix, {})[group] = None
        else:
            bisect.insort(self._ready[group.admitted], group, key=self._arrival)

    def _take_from_loading(self, group: Group) -> bool:
        key = group.request.prefix
        groups = self._loading.get(key) if key else None
        if key is None or groups is None or group not in groups:
            return False
        del groups[group]
        if not groups:
            del self._loading[key]
        return True
