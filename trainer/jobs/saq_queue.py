"""Deliveries through Redis by SAQ: its waiting list, its workers and their heartbeats, with JSON payloads only.

A delivery is one SAQ job that SAQ never retries. A lost one is delivered again under the next token, which makes the
old one harmless. Owns this use of SAQ; knows no rule of a job.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from redis.asyncio import Redis
from saq import Job as Delivery
from saq import Status, Worker
from saq.queue.redis import RedisQueue

from trainer.jobs.errors import JobStoreUnavailable
from trainer.jobs.lease import Lease
from trainer.jobs.redis_call import redis_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.jobs.base import AnyJob, Handler
    from trainer.jobs.record import Job

NAME: Final = "prefixd-trainer"
FUNCTION: Final = "run"
WAIT_S: Final = 1.0
"""A worker waits this long for a delivery before it asks again; less than the client's time-out."""
PATIENCE: Final = 5.0
"""Factor on the client's time-out, so that it exceeds ``WAIT_S``."""
STOP_S: Final = 30.0
LIVING: Final = frozenset({Status.NEW, Status.QUEUED, Status.ACTIVE})

_log = logging.getLogger("prefixd.trainer")


class SaqQueue:
    """A Queue over a client of the same event loop."""

    def __init__(self, client: Redis, worker: str, *, lease_s: int, stop_s: float = STOP_S) -> None:
        """``close`` closes ``client``. ``Lease`` says when a silent worker is lost under a lease of ``lease_s``.

        ``stop_s`` is the time that a handler gets to hand its job back when its worker ends.
        """
        self._queue = _Deliveries(client, NAME)
        self._worker, self._lease_s, self._stop_s = worker, lease_s, stop_s
        self._running: dict[str, Delivery] = {}

    async def put(self, job: Job) -> None:
        """See Queue."""
        async with redis_call():
            await self._queue.enqueue(
                Delivery(
                    FUNCTION,
                    kwargs={"tenant": job.tenant, "job_id": job.id, "token": job.token},
                    key=job.delivery,
                    timeout=0,
                    heartbeat=Lease(self._lease_s).lost_after_s,
                    retries=1,
                    ttl=self._lease_s * 10,
                )
            )

    async def dead(self, jobs: Sequence[AnyJob]) -> list[AnyJob]:
        """See Queue."""
        if not jobs:
            return []
        async with redis_call():
            deliveries = await self._queue.jobs([job.delivery for job in jobs])
        return [job for job, delivery in zip(jobs, deliveries, strict=True) if not _lives(delivery)]

    async def work(self, handler: Handler, concurrency: int) -> None:
        """See Queue."""

        async def run(context: dict[str, Any], *, tenant: str, job_id: str, token: int) -> None:
            delivery: Delivery = context["job"]
            self._running[delivery.key] = delivery
            try:
                await handler(tenant, job_id, token)
            except Exception:
                _log.exception("a delivery broke off")
            finally:
                del self._running[delivery.key]

        lease = self._lease_s
        await _Worker(
            self._queue,
            [(FUNCTION, run)],
            id=self._worker,
            concurrency=concurrency,
            dequeue_timeout=WAIT_S,
            cancellation_hard_deadline_s=self._stop_s,
            timers={"schedule": lease, "worker_info": lease, "sweep": lease, "abort": lease},
        ).start()

    async def heartbeat(self, job: Job) -> None:
        """See Queue."""
        delivery = self._running.get(job.delivery)
        if delivery is not None:
            await delivery.update(status=Status.ACTIVE)  # a worker that slept may have written another status

    async def close(self) -> None:
        """See Queue."""
        await self._queue.disconnect()


class _Worker(Worker[Any]):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.SIGNALS = []  # the process handles signals


class _Deliveries(RedisQueue):
    """SAQ's queue with two changes: it waits for a Redis that is away, and a sweep never delivers again."""

    def __init__(self, client: Redis, name: str) -> None:
        super().__init__(client, name)
        self._suspects: set[bytes] = set()

    def __repr__(self) -> str:
        return f"<deliveries of {self.name}>"  # SAQ logs it; the default one shows the address of the Redis

    async def dequeue(self, timeout: float = 0.0, poll_interval: float = 0.0) -> Delivery | None:
        try:
            async with redis_call():
                return await super().dequeue(timeout, poll_interval)
        except JobStoreUnavailable:
            await asyncio.sleep(WAIT_S)
            return None

    async def update(self, job: Delivery, **fields: Any) -> None:
        async with redis_call():
            await super().update(job, **fields)

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:
        """Delete the deliveries of lost workers.

        A delivery that was taken but is still marked as queued in two sweeps in a row belongs to a worker that died
        between the two writes.
        """
        swept, taken = [], set()
        async with redis_call():
            for member in await self.redis.lrange(self._active, 0, -1):
                delivery = await self._get_job_by_id(member)
                if delivery is not None and delivery.status == Status.QUEUED and member not in self._suspects:
                    taken.add(member)
                elif delivery is None or delivery.status != Status.ACTIVE or delivery.stuck:
                    async with self.redis.pipeline(transaction=True) as pipe:
                        await pipe.lrem(self._active, 0, member).zrem(self._incomplete, member).delete(member).execute()
                    swept.append(member.decode())
        self._suspects = taken
        return swept


def _lives(delivery: Delivery | None) -> bool:
    return delivery is not None and delivery.status in LIVING and not delivery.stuck
