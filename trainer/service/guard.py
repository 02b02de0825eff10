"""Watches a job's process while it trains: a cancel, another worker that has the job, and the job's time.

Owns when the process is asked to stop, and what the job ends with then. Knows neither store nor process: it gets a call
that reads the record, and a child that it may stop.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from trainer.jobs.errors import JobStoreUnavailable
from trainer.jobs.record import Failure, Job
from trainer.jobs.signals import Watch
from trainer.service.outcome import Cancelled, JobFailed, version_of
from trainer.service.process import ChildProcess
from trainer.service.settings import TrainerSettings

LOOK_S: Final = 2.0
"""How often a worker reads its job's record when no signal wakes it."""
STOP_S: Final = 10.0
"""How long the process of a cancelled job may go on: loading and scoring check for a stop less often than training."""


class Guard:
    """Of one process of one job. The job's time is what ``max_job_s`` leaves of that of its earlier workers."""

    def __init__(
        self,
        job: Job,
        child: ChildProcess,
        watch: Watch,
        owned: Callable[[], Awaitable[Job]],
        settings: TrainerSettings,
    ) -> None:
        """``owned`` reads the job's record, and raises Fenced if another worker has the job."""
        self._child, self._watch, self._owned, self._settings = child, watch, owned, settings
        self._deadline = time.monotonic() + settings.max_job_s - job.ran_s
        self._asked_at: float | None = None
        self._late = False

    async def run(self) -> None:
        """Stop the process when it is time. Raises Fenced, and ``ended`` if it goes on for ``STOP_S`` all the same."""
        while True:
            with contextlib.suppress(JobStoreUnavailable):  # training goes on without the store
                if (await self._owned()).to_be_cancelled:
                    self._stop()
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._late = True
                self._stop()
            if self._asked_at is not None and time.monotonic() - self._asked_at > STOP_S:
                raise self.ended()
            await self._watch.wait(LOOK_S if left <= 0 else min(LOOK_S, left))

    def version_of(self, last: Mapping[str, Any], code: int) -> str:
        """See ``outcome.version_of``. A process that was stopped for its time fails its job."""
        try:
            return version_of(last, code, self._settings)
        except Cancelled:
            raise self.ended() from None

    def ended(self) -> Exception:
        """What a job whose process was stopped ends with. A cancel wins over its time, see ``job.failed``."""
        if not self._late:
            return Cancelled()
        limit = self._settings.max_job_s
        return JobFailed(
            Failure(
                "time_limit",
                f"expected the job to end within {limit:g} s of running, got one that was not done; its last "
                "checkpoint is kept, and a retry goes on from it",
            )
        )

    def _stop(self) -> None:
        if self._asked_at is None:
            self._child.stop()
            self._asked_at = time.monotonic()
