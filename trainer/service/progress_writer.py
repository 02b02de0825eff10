"""Writes a running job's progress to its record, less often than the process sends it.

Owns the rate and how several messages become one; knows no process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from trainer.jobs.base import JobStore
from trainer.jobs.errors import Fenced, JobNotFound, JobStoreUnavailable
from trainer.jobs.job import progressed
from trainer.jobs.record import Job
from trainer.service.metrics import JobMetrics


class ProgressWriter:
    """Takes progress messages and writes the newest to the record, at most every ``interval_s`` seconds."""

    def __init__(self, job: Job, store: JobStore, metrics: JobMetrics, interval_s: float) -> None:
        self._job, self._store, self._metrics, self._interval_s = job, store, metrics, interval_s
        self._stage, self._progress, self._step, self._tokens = "loading", dict[str, Any](), 0, 0
        self._changed = asyncio.Event()

    def receive(self, message: Mapping[str, Any]) -> None:
        """Take a ``stage`` or ``progress`` message. The last validation loss stays until a new one comes."""
        if message["event"] == "stage":
            self._stage = str(message["stage"])
        else:
            kept = {name: self._progress[name] for name in ("validation_loss",) if name in self._progress}
            told = {name: value for name, value in message.items() if name != "event" and value is not None}
            self._progress = kept | told
            self._step = max(self._step, int(told.get("step", 0)))  # scores may come before it is written
            self._tokens = max(self._tokens, int(told.get("tokens", 0)))
            self._metrics.progressed(self._job, self._progress)
        self._changed.set()

    async def run(self) -> None:
        """Write new progress at most every ``interval_s`` seconds, until cancelled."""
        while True:
            await self._changed.wait()
            await self.flush()
            await asyncio.sleep(self._interval_s)

    async def flush(self) -> None:
        """Write new progress now; keep it for the next time if the store is away."""
        if not self._changed.is_set():
            return
        self._changed.clear()
        job, stage, progress, step, tokens = self._job, self._stage, self._progress, self._step, self._tokens
        with contextlib.suppress(JobNotFound, Fenced):  # ``Guard`` handles both
            try:
                await self._store.change(
                    job.tenant, job.id, lambda found: progressed(found, job.token, progress, stage, step, tokens)
                )
            except JobStoreUnavailable:
                self._changed.set()
