"""The times around a lease hold together, whatever its length."""

from __future__ import annotations

from trainer.jobs.lease import Lease


def test_a_dead_workers_jobs_are_found_within_the_lease() -> None:
    for seconds in range(2, 3601):
        lease = Lease(seconds)
        assert lease.lost_after_s + lease.look_s < lease.seconds


def test_nobody_is_lost_by_an_absence_of_the_store_that_is_too_short_to_be_noticed() -> None:
    """The last heartbeat before it, the absence itself, and the first heartbeat after it."""
    for seconds in range(2, 3601):
        lease = Lease(seconds)
        assert lease.heartbeat_s + lease.absence_s + lease.heartbeat_s < lease.lost_after_s
