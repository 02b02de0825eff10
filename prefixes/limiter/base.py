"""What a limiter is asked and what it answers. Owns the contract; knows no store and no name of a limit.

A rate of a minute is a token bucket: it holds a minute's worth and refills all the time. Days and months are those of
UTC. Who takes says the most that it may need, and at its end what it has used; the difference is given back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

MINUTE_S: Final = 60.0
DAY_S: Final = 86_400.0
TOLERANCE: Final = 1e-6
"""What buckets are off by, because seconds are no whole numbers: who waits as told is let in."""


class Window(StrEnum):
    """The time that a limit is for."""

    MINUTE = "minute"
    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True)
class Charge:
    """``amount`` to be taken from a counter of a tenant, or of one of its keys, which may have ``limit`` a window."""

    counter: str  # "requests", "tokens", "training_steps"
    window: Window
    limit: int
    amount: int
    key: str | None = None  # the key's id; None for the tenant itself

    @property
    def field(self) -> str:
        """The counter's name within its tenant."""
        return field_of(self.key, self.counter, self.window)

    @property
    def is_impossible(self) -> bool:
        """Whether it is above the whole limit, so that no wait helps."""
        return self.amount > self.limit


@dataclass(frozen=True)
class State:
    """How one charge's counter stands: after it was taken, or as it was where it was refused.

    ``used`` includes what is reserved. ``reset_s`` are the seconds until nothing counts any more, ``wait_s`` those
    until the charge can be taken, 0 where it could.
    """

    charge: Charge
    used: int
    reset_s: float
    wait_s: float = 0.0

    @property
    def remaining(self) -> int:
        return max(0, self.charge.limit - self.used)


@dataclass(frozen=True)
class Taken:
    """All charges were taken."""

    states: tuple[State, ...]


@dataclass(frozen=True)
class Refused:
    """Nothing was taken. ``by`` is the charge that must wait longest; one that is impossible comes first."""

    states: tuple[State, ...]

    @property
    def by(self) -> State:
        return max(self.states, key=lambda state: (state.charge.is_impossible, state.wait_s))


def field_of(key: str | None, counter: str, window: Window) -> str:
    """A counter's name within its tenant."""
    return f"{key or ''}/{counter}/{window}"


class Limiter(Protocol):
    """Thread-safe. ``remote`` says that a call may wait for a network, so that it is none for an event loop.

    Each call raises RegistryUnavailable where the counters cannot be reached.
    """

    @property
    def remote(self) -> bool: ...

    def take(self, tenant: str, reservation_id: str, charges: Sequence[Charge], ttl_s: float) -> Taken | Refused:
        """Take all charges in one step, or none. Each is of a counter of its own.

        The reservation expires after ``ttl_s`` and gives everything back, unless it was settled or renewed. A second
        call with an id that is reserved takes nothing more.
        """

    def settle(self, tenant: str, reservation_id: str, used: Mapping[str, int]) -> None:
        """End a reservation: of each counter in ``used`` so much was used. Other counters keep what was taken.

        What is unknown, expired or was settled before changes nothing. It is of the day on which it was taken.
        """

    def renew(self, tenant: str, reservation_ids: Sequence[str], ttl_s: float) -> None:
        """Let those reservations that are still there expire ``ttl_s`` from now."""

    def close(self) -> None:
        """Close what is open."""
