"""The two Protocols behind the service: where jobs are kept, and how deliveries reach workers.

A store is the truth about a job; a queue is only the way to a worker. If a queue loses a delivery, ``Worker.reconcile``
finds the job in the store and delivers it again under a new token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeVar

from trainer.jobs.open_job import OpenJob
from trainer.jobs.record import Change, Event, Job, State
from trainer.jobs.room import UNBOUNDED, Room
from trainer.jobs.signals import Watch
from trainer.jobs.turns import Work

Plan = Callable[[Job], Change]
"""A pure function, such as ``job.claimed``. A store calls it again if another change came first."""

Handler = Callable[[str, str, int], Awaitable[None]]
"""Runs a delivery, given as tenant, job id and token, to its end."""

MAX_EVENTS: Final = 10_000
"""The newest events kept per job; the report has the whole curve."""

PAGE: Final = 100
"""Records that are read at once. They may be large, and the event loop has other things to do."""

AnyJob = TypeVar("AnyJob", Job, OpenJob)
"""What has a delivery: a record, or the part of one."""


class JobStore(Protocol):
    """Jobs and their events. Every method raises JobStoreUnavailable when the store cannot be reached or read."""

    async def create(self, change: Change, room: Room = UNBOUNDED) -> Job:
        """Store a new job and its first events. Raises what ``room`` raises; the count and the write are one step."""

    async def get(self, tenant: str, job_id: str) -> Job:
        """Raises JobNotFound for an unknown job or another tenant's."""

    async def change(self, tenant: str, job_id: str, plan: Plan, room: Room = UNBOUNDED) -> Job:
        """Apply ``plan`` to the stored job, atomically with its events. Raises JobNotFound and what ``plan`` raises.

        A job that it opens again needs ``room`` as a new one does.
        """

    async def jobs(
        self, tenant: str | None, *, limit: int, before: str | None = None, state: State | None = None
    ) -> list[Job]:
        """Return the jobs of a tenant or of all, newest first; with ``before``, only those older than that job; with
        ``state``, only those in it. Fewer than ``limit`` are all that there are.
        """

    async def owner(self, job_id: str) -> str:
        """Return the tenant whose job it is. Raises JobNotFound. It may look at the names of all jobs."""

    async def open_jobs(self, tenant: str | None = None) -> list[OpenJob]:
        """Return the queued and running jobs, of all tenants or of one, in the order in which they were queued.

        It is called every few seconds by every process: it reads no record.
        """

    async def events(self, tenant: str, job_id: str, after: str | None = None) -> list[Event]:
        """Return the job's events that follow the event with the id ``after``. Raises JobNotFound."""

    def watch(self, job_id: str) -> AbstractContextManager[Watch]:
        """Give a watch that wakes whenever the job changes, until the block ends."""

    async def delete(self, tenant: str, job_id: str) -> Job:
        """Delete an ended job and its events, and return the job. Raises JobNotFound, JobConflict."""

    async def check(self) -> None:
        """Raise JobStoreUnavailable unless the store answers."""

    async def close(self) -> None:
        """Release connections and locks."""


class Queue(Protocol):
    """Delivers to workers, each delivery at most once, in turn among tenants (``turns``).

    Raises JobStoreUnavailable when it cannot be reached.
    """

    async def put(self, job: Job) -> None:
        """Deliver ``job`` under its current token to one worker. Does nothing if that delivery is on its way."""

    async def dead(self, jobs: Sequence[AnyJob]) -> list[AnyJob]:
        """Return those of ``jobs`` whose delivery is lost: it does not wait, and no live worker has it."""

    async def work(self, handler: Handler, concurrency: int) -> None:
        """Take deliveries and pass them to ``handler``, ``concurrency`` at once, until cancelled.

        A cancel also cancels the handlers that run, and waits for them.
        """

    async def heartbeat(self, job: Job) -> None:
        """Report that the worker that has ``job`` is alive."""

    async def settle(self, job_id: str, step: int) -> None:
        """Give back to the tenant of a job that ended at ``step`` what the job was charged for and did not take.

        Does nothing for a job that no worker took, and the second time.
        """

    async def unsettled(self) -> list[Work]:
        """Return the work that workers took and that is not settled."""

    async def close(self) -> None:
        """Release connections."""
