"""Writes a running job's progress to its record, less often than the process sends it.

Owns the rate and what of several messages stays; knows no process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from trainer.jobs.base import JobStore
from trainer.jobs.errors import Fenced, JobNotFound, JobStoreUnavailable
from trainer.jobs.job import Job, progressed
from trainer.service.metrics import JobMetrics


class ProgressWriter:
    """Takes progress messages as they come; the record gets the newest, at most every ``interval_s`` seconds."""

    def __init__(self, job: Job, store: JobStore, metrics: JobMetrics, interval_s: float) -> None:
        self._job, self._store, self._metrics, self._interval_s = job, store, metrics, interval_s
        self._stage, self._progress = "loading", dict[str, Any]()
        self._changed = asyncio.Event()

    def receive(self, message: Mapping[str, Any]) -> None:
        """A ``stage`` or ``progress`` message."""
        if message["event"] == "stage":
            self._stage = str(message["stage"])
        else:
            kept = {name: self._progress[name] for name in ("validation_loss",) if name in self._progress}
            told = {name: value for name, value in message.items() if name != "event" and value is not None}
            self._progress = kept | told
            self._metrics.progressed(self._job, self._progress)
        self._changed.set()

    async def run(self) -> None:
        """Write what is new, at most every ``interval_s`` seconds."""
        while True:
            await self._changed.wait()
            await self.flush()
            await asyncio.sleep(self._interval_s)

    async def flush(self) -> None:
        """Write what is new, if it can be written just now."""
        if not self._changed.is_set():
            return
        self._changed.clear()
        job, stage, progress = self._job, self._stage, self._progress
        with contextlib.suppress(JobNotFound, Fenced):  # the guard finds out about a fence
            try:
                await self._store.change(
                    job.tenant, job.id, lambda found: progressed(found, job.token, progress, stage)
                )
            except JobStoreUnavailable:
                self._changed.set()
