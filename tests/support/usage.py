"""Usage for tests: subjects, counts and batches, and a plain reference of what a store should have summed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping

from prefixes.usage.model import Batch, Counts, Kind, Outcome, Subject, today
from prefixes.usage.store import UsageStore


def subject(
    tenant: str = "acme",
    task: str | None = "acme/e2e",
    *,
    key: str | None = "AAAAAAAAAAAA",
    kind: Kind = Kind.GENERATION,
    outcome: Outcome = Outcome.FINISHED,
) -> Subject:
    """A subject like most."""
    return Subject(kind, tenant, key, task, "sha256:" + "0" * 64 if task else None, outcome)


def batch(number: int, counts: Mapping[Subject, Counts], *, writer: str = "w", day: str | None = None) -> Batch:
    """A batch of today, unless told otherwise."""
    return Batch(writer, number, day or today(), counts)


def random_counts(random: random.Random) -> Counts:
    """Counts of any size."""
    return Counts(*(random.choice((0, 1, random.randrange(10**4), random.randrange(10**12))) for _ in range(8)))


def kept(store: UsageStore, first: str | None = None, last: str | None = None) -> dict[tuple[str, Subject], Counts]:
    """What the store has, by day and subject; every row once."""
    rows = list(store.read(first or "0001-01-01", last or "9999-12-31"))
    found = {(row.day, row.subject): row.counts for row in rows}
    assert len(found) == len(rows)
    return found


class Reference:
    """Sums batches as they come, each once."""

    def __init__(self) -> None:
        self.sums: defaultdict[tuple[str, Subject], Counts] = defaultdict(Counts)
        self._seen: set[tuple[str, str, int]] = set()

    def add(self, batch: Batch) -> bool:
        """Whether the batch is new."""
        name = (batch.writer, batch.day, batch.number)
        if name in self._seen:
            return False
        self._seen.add(name)
        for subject, counts in batch.counts.items():
            before = self.sums[batch.day, subject].values()
            self.sums[batch.day, subject] = Counts(
                *(mine + theirs for mine, theirs in zip(before, counts.values(), strict=True))
            )
        return True
