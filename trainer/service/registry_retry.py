"""Retries a registry that does not answer, while this worker still has the job and no cancel is requested.

Owns the time between two tries and the total time; knows no registry.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final

from prefixes.errors import RegistryUnavailable
from trainer.jobs.errors import JobStoreUnavailable
from trainer.jobs.record import Job
from trainer.jobs.signals import Watch
from trainer.service.outcome import Cancelled

RETRY_S: Final = 1.0


class RegistryRetry:
    """The retries of one step of one job, for ``limit_s`` seconds from now."""

    def __init__(self, limit_s: float, owned: Callable[[], Awaitable[Job]], watch: Watch) -> None:
        """``owned`` reads the job's record, and raises Fenced if another worker has the job."""
        self._owned, self._watch = owned, watch
        self._deadline = time.monotonic() + limit_s

    async def wait(self, error: RegistryUnavailable) -> None:
        """Return when it is time to try again. Raises ``error`` after the limit, Cancelled, Fenced."""
        if time.monotonic() > self._deadline:
            raise error
        with contextlib.suppress(JobStoreUnavailable):
            if (await self._owned()).to_be_cancelled:
                raise Cancelled from None
        await self._watch.wait(RETRY_S)
