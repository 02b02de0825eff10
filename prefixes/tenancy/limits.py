"""Limits: what a tenant or a key may take. Owns their names, units, ranges and the defaults of a tenant.

Knows neither who counts nor where. A key's limits are inside its tenant's: both hold, and the key has none of its own
unless told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
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


NAMES: Final = tuple(one.name for one in fields(Limits))
NO_LIMITS: Final = Limits()
TENANT_LIMITS: Final = Limits(
    requests_per_minute=60_000,
    tokens_per_minute=10_000_000,
    tokens_per_day=2_000_000_000,
    tokens_per_month=20_000_000_000,
)
"""A tenant's where it has no other: more than one server computes, so that they stop a runaway and nobody else."""
