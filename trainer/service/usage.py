"""What a job took, for its tenant's usage: steps, tokens and time of each attempt, once that has ended.

Owns what is counted of a job, and its batch: the job's id and attempt, so that recording it again changes nothing.
Knows no queue. It stays when the job is deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from prefixes.spec import TaskRef
from prefixes.usage.model import Batch, Counts, Kind, Outcome, Subject, day_of
from prefixes.usage.store import UsageStore
from trainer.jobs.record import Job, State

OUTCOMES: Final[Mapping[State, Outcome]] = {
    "succeeded": Outcome.FINISHED, "cancelled": Outcome.ABORTED, "failed": Outcome.FAILED
}  # fmt: skip


@dataclass(frozen=True)
class JobUsage:
    """Records in the registry."""

    store: UsageStore

    async def record(self, job: Job) -> None:
        """Record the last attempt of a job if it has ended and a worker ever had it. Raises RegistryUnavailable."""
        if (batch := batch_of(job)) is not None:
            await asyncio.to_thread(self.store.add, batch)


def batch_of(job: Job) -> Batch | None:
    """What the last attempt of an ended job took; None if there is nothing to count.

    Steps that are made again after a loss or a shutdown count once: those up to the highest that was reached.
    """
    seconds = _seconds(job)
    if job.finished_at is None or not job.ended or not seconds:
        return None
    counts = Counts(
        jobs=1,
        training_steps=job.steps - job.steps_before,
        training_tokens=job.tokens - job.tokens_before,
        training_ms=round(1000 * seconds),
    )
    task = TaskRef.parse(job.spec["task"], job.tenant)
    subject = Subject(
        Kind.TRAINING, job.tenant, job.key_id, f"{task.tenant}/{task.name}", job.version, OUTCOMES[job.state]
    )
    return Batch(f"{job.id}.{job.attempt}", 1, day_of(job.finished_at), {subject: counts})


def _seconds(job: Job) -> float:
    """How long workers had the attempt. One that ended while it waited has nothing but what was before."""
    if job.finished_at is None or job.claimed_at is None or job.claimed_at < job.queued_at:
        return job.ran_s
    last = datetime.fromisoformat(job.finished_at) - datetime.fromisoformat(job.claimed_at)
    return job.ran_s + max(0.001, last.total_seconds())  # claimed at all
