"""UsageStore: where a registry keeps what its tenants used. Owns the contract; knows no store.

Days are kept for ``model.DAYS_KEPT``, with the numbers of the batches that made them, so that no batch counts twice in
all that time. Older days are removed when a new day begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prefixes.usage.model import Batch, DayOfUsage, Row


class UsageStore(Protocol):
    """Every method raises RegistryUnavailable where the store cannot be reached or is not the one that was opened."""

    def add(self, batch: Batch) -> bool:
        """Add all of ``batch``, or nothing; False where it was added before, or its day is no longer kept.

        A tenant has at most ``model.MAX_ROWS`` rows a day and what is folded beside them.
        """

    def read(self, first: str, last: str, tenant: str | None = None) -> Iterator[Row]:
        """The rows of the days from ``first`` to ``last``, both included, by day; of one tenant or of all."""

    def days(self) -> list[str]:
        """Every day that has rows, sorted."""

    def day(self, day: str) -> DayOfUsage:
        """All that is kept of one day."""

    def put(self, found: DayOfUsage) -> None:
        """Put ``found`` in the place of what is kept of that day: for copies, while nobody adds to it."""
