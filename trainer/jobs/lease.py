"""When a worker that is not heard of is lost: what follows from the lease, the time within which another has its jobs.

Owns these numbers and how they hold together; knows no job and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lease:
    """All in seconds. Two heartbeats and an absence of the store take less than it takes to be lost."""

    seconds: int

    @property
    def lost_after_s(self) -> int:
        """A worker not heard of for longer is lost: early enough for another to be found within the lease."""
        return max(1, self.seconds * 3 // 4)

    @property
    def look_s(self) -> float:
        """How often those who look after the others do."""
        return min(2.0, self.seconds / 8)

    @property
    def heartbeat_s(self) -> float:
        """How often a worker says that it lives."""
        return self.lost_after_s / 6

    @property
    def absence_s(self) -> float:
        """A store that was away for longer has kept the living from saying so: they get the time to."""
        return self.lost_after_s / 2
