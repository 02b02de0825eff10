"""References: what is remembered of task references, bounded, and found by task too.

Owns the bound, the order of use and the index by task. Knows neither the registry nor what a value says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from prefixes.spec import TaskRef

_T = TypeVar("_T")


class References(Generic[_T]):
    """Values by reference, the least recently requested first. Beyond ``most`` that one is dropped."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[TaskRef, _T] = {}
        self._by_task: dict[tuple[str, str], set[TaskRef]] = {}

    def __iter__(self) -> Iterator[TaskRef]:
        return iter(self._values)

    def get(self, ref: TaskRef) -> _T | None:
        """The value of ``ref``, or None."""
        return self._values.get(ref)

    def of_task(self, tenant: str, name: str) -> list[TaskRef]:
        """The references to a task."""
        return list(self._by_task.get((tenant, name), ()))

    def put(self, ref: TaskRef, value: _T) -> None:
        """Remember ``value``; a known reference keeps its place in the order."""
        while ref not in self._values and len(self._values) >= self._most:
            self.drop(next(iter(self._values)))
        self._values[ref] = value
        self._by_task.setdefault((ref.tenant, ref.name), set()).add(ref)

    def requested(self, ref: TaskRef) -> None:
        """Count ``ref`` as the most recently requested, if it is known."""
        if ref in self._values:
            self._values[ref] = self._values.pop(ref)

    def drop(self, ref: TaskRef) -> None:
        """Forget ``ref``, if it is known."""
        if ref not in self._values:
            return
        del self._values[ref]
        refs = self._by_task[ref.tenant, ref.name]
        refs.discard(ref)
        if not refs:
            del self._by_task[ref.tenant, ref.name]
