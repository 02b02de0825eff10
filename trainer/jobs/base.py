"""The two Protocols behind the service: where jobs are kept, and how deliveries reach workers.

A store is the truth about a job; a queue is only the way to a worker. What a queue loses, ``worker`` finds in the store
and delivers anew under another token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

from trainer.jobs.job import Change, Event, Job
from trainer.jobs.signals import Watch

Plan = Callable[[Job], Change]
"""A move as ``job`` has them: pure, and called again when another change came between."""

Handler = Callable[[str, str, int], Awaitable[None]]
"""Runs the delivery (tenant, job id, token) to its end."""

MAX_EVENTS: Final = 10_000
"""Events kept per job, the newest; the report has the whole curve."""


class JobStore(Protocol):
    """Jobs and their events. Every method raises JobStoreUnavailable when the store cannot be reached or read."""

    async def create(self, change: Change) -> Job:
        """Keep a new job and its first events."""

    async def get(self, tenant: str, job_id: str) -> Job:
        """JobNotFound for none, or another tenant's."""

    async def change(self, tenant: str, job_id: str, plan: Plan) -> Job:
        """Apply ``plan`` to the job as it is, atomically together with its events. JobNotFound, or what plan raises."""

    async def jobs(self, tenant: str, *, limit: int, before: str | None = None) -> list[Job]:
        """The tenant's jobs, the newest first, from behind the job ``before`` on."""

    async def open_jobs(self) -> list[Job]:
        """All queued and running jobs of all tenants, in the order of their queueing."""

    async def events(self, tenant: str, job_id: str, after: str | None = None) -> list[Event]:
        """The job's events behind the one with the id ``after``. JobNotFound."""

    def watch(self, job_id: str) -> AbstractContextManager[Watch]:
        """Within the block, the watch wakes when something happens to the job."""

    async def delete(self, tenant: str, job_id: str) -> Job:
        """Forget a job that has ended, and its events; the job as it was. JobNotFound, JobConflict."""

    async def check(self) -> None:
        """Raise JobStoreUnavailable unless the store answers."""

    async def close(self) -> None:
        """Release connections and locks."""


class Queue(Protocol):
    """Deliveries to workers, each at most once. Raises JobStoreUnavailable when it cannot be reached."""

    async def put(self, job: Job) -> None:
        """Deliver ``job`` under its present token to one worker; nothing for a delivery that is on its way."""

    async def dead(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of ``jobs`` whose token's delivery neither waits nor is with a worker that was heard of lately."""

    async def work(self, handler: Handler, concurrency: int) -> None:
        """Take deliveries and hand them to ``handler``, ``concurrency`` at once, until this is cancelled.

        What runs then is cancelled as well, and awaited.
        """

    async def heartbeat(self, job: Job) -> None:
        """The worker that has ``job`` lives."""

    async def close(self) -> None:
        """Release connections."""
