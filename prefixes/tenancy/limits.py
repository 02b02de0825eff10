"""Limits: what a tenant or a key may take. Owns their names, units, ranges and the defaults of a tenant.

Knows neither who counts nor where. A key's limits are inside its tenant's: both hold, and the key has none of its own
unless told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Final

from pydantic import ConfigDict

MAX_LIMIT: Final = 10**15
"""The most that any of them may be. It is what a JSON number and Redis' Lua carry exactly."""


@dataclass(frozen=True)
class Limits:
    """None is no limit of one's own: for a tenant its default holds, for a key its tenant's limit alone.

    Rates are of any minute, days and months those of UTC. Tokens are those of input, prefix and output.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    rows_running: int | None = None
    requests_waiting: int | None = None
    max_new_tokens: int | None = None
    num_beams: int | None = None
    registry_bytes: int | None = None
    registry_tasks: int | None = None
    registry_versions: int | None = None
    dataset_bytes: int | None = None
    open_jobs: int | None = None
    training_steps_per_day: int | None = None

    def given(self) -> Iterator[tuple[str, int]]:
        """Name and value of each that is set."""
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None:
                yield one.name, value

    def over(self, lower: Limits) -> Limits:
        """These, and those of ``lower`` for what is not set here."""
        return replace(lower, **dict(self.given()))

    def within(self, upper: Limits) -> Limits:
        """What both allow: of each the smaller one."""
        both = {name: min(value, own) for name, value in upper.given() if (own := getattr(self, name)) is not None}
        return replace(self.over(upper), **both)


NAMES: Final = tuple(one.name for one in fields(Limits))
NO_LIMITS: Final = Limits()
DESCRIPTIONS: Final[Mapping[str, str]] = {
    "requests_per_minute": "Requests in any minute.",
    "tokens_per_minute": "Tokens of input, prefix and output in any minute.",
    "tokens_per_day": "The same in a day, UTC.",
    "tokens_per_month": "The same in a month, UTC.",
    "rows_running": "Rows that run at once; each beam and each sample is one.",
    "requests_waiting": "Requests that wait at once.",
    "max_new_tokens": "The most that a request may ask for.",
    "num_beams": "The most that a request may ask for.",
    "registry_bytes": "Bytes of artifacts in the registry.",
    "registry_tasks": "Tasks in the registry.",
    "registry_versions": "Versions of all tasks in the registry.",
    "dataset_bytes": "Bytes of datasets at the trainer.",
    "open_jobs": "Jobs that wait or run at the trainer.",
    "training_steps_per_day": "Training steps in a day, UTC.",
}
TENANT_LIMITS: Final = Limits(
    requests_waiting=1_000,
    registry_bytes=100 << 30,
    registry_tasks=10_000,
    registry_versions=100_000,
    dataset_bytes=100 << 30,
    open_jobs=1_000,
)
"""A tenant's where it has no other: what is kept or piles up is bounded, and what fairness shares out is not."""


@lru_cache(maxsize=4096)
def effective(own: Limits) -> Limits:
    """What holds for a tenant with these limits: its own, and the defaults for all else."""
    return own.over(TENANT_LIMITS)
