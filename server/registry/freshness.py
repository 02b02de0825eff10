"""Freshness: how long what was read of the registry is believed.

Owns the rules for a known reference and for one that does not exist. Knows what the link says of the registry and of
announcements; asks nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefixes.registry.base import Resolved
from server.registry.link import RegistryLink

ANNOUNCED_TTL_S: Final = 10.0
"""A reference is read again after this long, even if changes are announced."""
ABSENT_TTL_S: Final = 0.5
"""What does not exist is asked for again after this long, unless changes are announced: a publish is soon seen."""


@dataclass(frozen=True)
class Known:
    """What a reference means."""

    resolved: Resolved
    at: float  # time.monotonic() seconds when its read began; it was true then
    generation: int  # of the announcements at that time
    outdated: bool = False  # a change was, or may have been, made that has not been read yet


@dataclass(frozen=True)
class Absent:
    """A reference to what does not exist, with the words and facts of its TaskNotFound."""

    message: str
    detail: Mapping[str, Any]
    at: float  # as in Known
    generation: int


class Freshness:
    """The rules, for one link."""

    def __init__(self, link: RegistryLink, *, alias_ttl_s: float, max_stale_s: float) -> None:
        self.max_stale_s = max_stale_s
        self._link, self._ttl = link, alias_ttl_s

    def is_fresh(self, known: Known) -> bool:
        """Whether it is used without a read."""
        return not known.outdated and self._is_believed(known.at, known.generation, self._ttl)

    def is_absent(self, absent: Absent) -> bool:
        """Whether it still counts as absent without a read; never while the registry is known to be away."""
        return self._link.up and self._is_believed(absent.at, absent.generation, min(self._ttl, ABSENT_TTL_S))

    def is_servable(self, known: Known) -> bool:
        """Whether it was true recently enough to be used while the registry is away."""
        return time.monotonic() - self.true_at(known) <= self.max_stale_s

    def true_at(self, known: Known) -> float:
        """When it was last known to be true: at its read, or later, as long as no change was announced."""
        announced = None if known.outdated else self._link.announced_until(known.generation)
        return max(known.at, announced or known.at)

    def _is_believed(self, at: float, generation: int, ttl: float) -> bool:
        age = time.monotonic() - at
        return age < ttl or (age < ANNOUNCED_TTL_S and self._link.is_announcing(generation))
