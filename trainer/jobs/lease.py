"""When a silent worker counts as lost. The lease is the time within which another worker takes its jobs.

Owns the periods that follow from the lease; knows no job and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lease:
    """All in seconds. Two heartbeats plus ``absence_s`` are less than ``lost_after_s``."""

    seconds: int

    @property
    def lost_after_s(self) -> int:
        """A worker that is silent for longer is lost. The rest of the lease is for finding another."""
        return max(1, self.seconds * 3 // 4)

    @property
    def look_s(self) -> float:
        """How often every process looks for lost jobs."""
        return min(2.0, self.seconds / 8)

    @property
    def heartbeat_s(self) -> float:
        """How often a worker sends a heartbeat."""
        return self.lost_after_s / 6

    @property
    def absence_s(self) -> float:
        """If the store was away for longer, live workers missed heartbeats: none is judged for one lease."""
        return self.lost_after_s / 2
