"""The queue of a service without Redis: deliveries within one process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from trainer.jobs.base import AnyJob, Handler
from trainer.jobs.record import Job

_log = logging.getLogger("prefixd.trainer")


class LocalQueue:
    """A Queue whose deliveries end with the process; ``worker.reconcile`` makes new ones at the next start."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[str, str, int]] = asyncio.Queue()
        self._alive: set[str] = set()

    async def put(self, job: Job) -> None:
        """See Queue."""
        if job.delivery not in self._alive:
            self._alive.add(job.delivery)
            self._queue.put_nowait((job.tenant, job.id, job.token))

    async def dead(self, jobs: Sequence[AnyJob]) -> list[AnyJob]:
        """See Queue."""
        return [job for job in jobs if job.delivery not in self._alive]

    async def work(self, handler: Handler, concurrency: int) -> None:
        """See Queue."""
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._serve(handler))

    async def heartbeat(self, job: Job) -> None:
        """See Queue."""

    async def close(self) -> None:
        """See Queue."""

    async def _serve(self, handler: Handler) -> None:
        while True:
            tenant, job_id, token = await self._queue.get()
            try:
                await handler(tenant, job_id, token)
            except Exception:
                _log.exception("a delivery broke off")
            finally:
                self._alive.discard(f"{job_id}.{token}")
