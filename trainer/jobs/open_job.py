"""What a look at the queue needs of an open job: not its spec, which may be a hundred times as large.

Owns these few fields and their JSON; knows no store.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from trainer.jobs.record import Job, State

NEEDED = ("dataset", "validation_dataset", "gate_dataset")
"""The fields of a spec that name a dataset."""


@dataclass(frozen=True)
class OpenJob:
    """A queued or running job. The store's record decides; this may be older by one change of an older trainer."""

    id: str
    tenant: str
    state: State
    token: int
    queued_at: str
    datasets: tuple[str, ...]  # the job cannot be trained without them
    key_id: str | None = None  # of the key with whose rights it publishes

    @property
    def delivery(self) -> str:
        """See Job."""
        return f"{self.id}.{self.token}"

    def as_text(self) -> str:
        """JSON; ``open_job_from`` takes it back."""
        return json.dumps(asdict(self))


def open_job_of(job: Job) -> OpenJob:
    """The part of ``job``'s record that a look needs."""
    datasets = tuple(job.spec[name] for name in NEEDED if job.spec.get(name) is not None)
    return OpenJob(job.id, job.tenant, job.state, job.token, job.queued_at, datasets, job.key_id)


def open_job_from(text: bytes) -> OpenJob:
    """Read what ``as_text`` wrote."""
    values: dict[str, Any] = json.loads(text)
    return OpenJob(**{**values, "datasets": tuple(values["datasets"])})
