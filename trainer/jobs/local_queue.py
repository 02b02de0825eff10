"""The queue of a service without Redis: deliveries within one process, and whose turn it is, in a file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from prefixes.files import write_json
from trainer.jobs.base import AnyJob, Handler
from trainer.jobs.record import Job
from trainer.jobs.turns import Turns, WeightOf, Work, turns_from, work_of

_log = logging.getLogger("prefixd.trainer")


class LocalQueue:
    """A Queue whose deliveries end with the process; ``worker.reconcile`` makes new ones at the next start."""

    def __init__(self, path: Path, weight_of: WeightOf) -> None:
        """``path`` is the file of the turns; one that cannot be read counts as none."""
        self._path, self._weight_of = path, weight_of
        self._turns = _read(path)
        self._waiting: list[tuple[Work, int]] = []  # with the token, the oldest first
        self._there = asyncio.Semaphore(0)  # counts them
        self._alive: set[str] = set()
        self._writing = asyncio.Lock()

    async def put(self, job: Job) -> None:
        """See Queue."""
        if job.delivery not in self._alive:
            self._alive.add(job.delivery)
            self._waiting.append((work_of(job), job.token))
            self._there.release()

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

    async def settle(self, job_id: str, step: int) -> None:
        """See Queue."""
        turns = self._turns.settled(job_id, step)
        if turns is not self._turns:
            self._turns = turns
            await self._write()

    async def unsettled(self) -> list[Work]:
        """See Queue."""
        return [charge.work for charge in self._turns.charges.values()]

    async def close(self) -> None:
        """See Queue."""

    async def _serve(self, handler: Handler) -> None:
        while True:
            await self._there.acquire()
            taken, self._turns = self._turns.next([work for work, _ in self._waiting], self._weight_of)
            work, token = self._waiting.pop(taken)
            try:
                await self._write()
                await handler(work.tenant, work.job_id, token)
            except Exception:
                _log.exception("a delivery broke off")
            finally:
                self._alive.discard(f"{work.job_id}.{token}")

    async def _write(self) -> None:
        async with self._writing:
            try:
                await asyncio.to_thread(write_json, self._path, self._turns.as_dict(), durable=False)
            except OSError as error:  # jobs go on, and a restart may forget a turn
                _log.warning("whose turn it is was not written", extra={"facts": {"error": error.strerror}})


def _read(path: Path) -> Turns:
    with contextlib.suppress(FileNotFoundError):
        return turns_from(path.read_bytes())
    return Turns()
