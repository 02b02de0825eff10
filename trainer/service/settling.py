"""What is settled once a job has ended: its steps of the day, its tenant's usage, and its turn in the queue.

Whoever ends a job settles it at once. Whoever finds that it ended elsewhere does it again, which changes nothing if it
was done: a process may die between the two. Knows neither process nor registry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from prefixes.errors import RegistryUnavailable
from trainer.jobs.base import JobStore, Queue
from trainer.jobs.errors import JobNotFound, JobStoreUnavailable
from trainer.jobs.open_job import OpenJob
from trainer.service.steps import StepReservations
from trainer.service.usage import JobUsage


@dataclass(frozen=True)
class Settling:
    """The places in which something of a job is left to settle."""

    store: JobStore
    queue: Queue
    steps: StepReservations
    usage: JobUsage

    async def settle(self, tenant: str, job_id: str) -> None:
        """Give back what the job was charged for and did not take, and record what it took, once it has ended.

        The queue comes last: by its charge the job is found again.
        """
        with contextlib.suppress(JobStoreUnavailable, RegistryUnavailable):  # it is found again
            try:
                job = await self.store.get(tenant, job_id)
            except JobNotFound:  # deleted while its delivery waited
                await self.queue.settle(job_id, 0)
            else:
                if job.ended:
                    await self.steps.settle(job)
                    await self.usage.record(job)
                    await self.queue.settle(job_id, job.steps)

    async def settle_ended(self, still_open: Sequence[OpenJob]) -> None:
        """Settle every job that a worker took and that is not among the open ones."""
        known = {job.id for job in still_open}
        for work in await self.queue.unsettled():
            if work.job_id not in known:
                await self.settle(work.tenant, work.job_id)
