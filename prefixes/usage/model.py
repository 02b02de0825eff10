"""What a registry counts of its tenants' use: the values, and the bounds that keep them small.

Owns what is summed and under which names. Knows no store, no engine and no price. A row is one day's sums of one
subject. Days are those of UTC. Nothing here says what was asked or answered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from typing import Final

from prefixes.errors import InvalidParameter

DAYS_KEPT: Final = 400
"""Days that rows, and the batches that made them, are remembered."""
MAX_ROWS: Final = 1_000
"""Of a tenant and day. What would be a row more is summed under the task ``OTHER``, without key and version."""
OTHER: Final = "(other)"
_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}")


class Kind(StrEnum):
    """What was used. ``shared`` is others' use of the tenant's own task, which they pay, without their names."""

    GENERATION = "generation"
    TRAINING = "training"
    SHARED = "shared"


class Outcome(StrEnum):
    """How it ended."""

    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True)
class Subject:
    """What is summed together. ``task`` is ``owner/name``, None for the bare backbone; ``key`` is a key's id."""

    kind: Kind
    tenant: str
    key: str | None
    task: str | None
    version: str | None
    outcome: Outcome

    @property
    def folded(self) -> Subject:
        """What it is summed under where its tenant has too many rows."""
        return Subject(self.kind, self.tenant, None, OTHER, None, self.outcome)


@dataclass(frozen=True)
class Counts:
    """Sums. ``training_ms`` is the time that workers had a job."""

    requests: int = 0
    input_tokens: int = 0
    prefix_tokens: int = 0
    output_tokens: int = 0
    jobs: int = 0
    training_steps: int = 0
    training_tokens: int = 0
    training_ms: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        """In the order of ``COUNTS``."""
        return tuple(getattr(self, name) for name in COUNTS)


COUNTS: Final = tuple(one.name for one in fields(Counts))


@dataclass(frozen=True)
class Row:
    """One day's sums of one subject."""

    day: str
    subject: Subject
    counts: Counts


@dataclass(frozen=True)
class Batch:
    """Counts to be added once. A writer numbers its batches of a day upwards and adds one after the other."""

    writer: str
    number: int
    day: str
    counts: Mapping[Subject, Counts]


@dataclass(frozen=True)
class DayOfUsage:
    """All that is kept of a day: its sums, and the number of the last batch of each writer."""

    day: str
    batches: Mapping[str, int]
    counts: Mapping[Subject, Counts]

    def covers(self, other: DayOfUsage) -> bool:
        """Whether every batch that made ``other`` is in here too."""
        return all(self.batches.get(writer, 0) >= number for writer, number in other.batches.items())


def add_to(sums: dict[Subject, Counts], rows: dict[str, int], subject: Subject, counts: Counts) -> None:
    """Add to a day's ``sums``; ``rows`` counts each tenant's. A row too many is folded."""
    if subject not in sums and rows.get(subject.tenant, 0) >= MAX_ROWS:
        subject = subject.folded
    if subject not in sums:
        rows[subject.tenant] = rows.get(subject.tenant, 0) + 1
    sums[subject] = sums.get(subject, Counts()) + counts


def today() -> str:
    """The day that it is now, in UTC."""
    return datetime.now(UTC).date().isoformat()


def day_of(time: str) -> str:
    """The day in UTC of a time in ISO 8601 with its zone."""
    return datetime.fromisoformat(time).astimezone(UTC).date().isoformat()


def first_kept(now: str | None = None) -> str:
    """The oldest day that is kept."""
    return (date.fromisoformat(now or today()) - timedelta(days=DAYS_KEPT - 1)).isoformat()


def asked_days(first: str | None, last: str | None) -> tuple[str, str]:
    """From and to, both included: this month's first day and today, where nobody says. Raises InvalidParameter."""
    end = today() if last is None else check_day("to", last)
    begin = today()[:8] + "01" if first is None else check_day("from", first)
    if begin > end:
        raise InvalidParameter(f"from: expected a day up to {end}, got {begin}", parameter="from")
    return begin, end


def check_day(name: str, text: str) -> str:
    """``text``, if it is a day. Raises InvalidParameter."""
    try:
        if _DAY.fullmatch(text):
            return date.fromisoformat(text).isoformat()
    except ValueError:
        pass
    raise InvalidParameter(f"{name}: expected a day as 2026-01-31, got {text[:40]!r}", parameter=name)
