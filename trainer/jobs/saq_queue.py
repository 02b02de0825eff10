"""Deliveries through Redis by SAQ: its waiting list, its workers and their heartbeats, with JSON payloads only.

A delivery is one SAQ job that SAQ never retries. A lost one is delivered again under the next token, which makes the
old one harmless. A worker takes the delivery whose tenant's turn it is (``turns``), in one script:

    saq:prefixd-trainer:queued            SAQ's list of the deliveries that wait
    prefixd-trainer:turns                 Turns, JSON

Owns this use of SAQ; knows no rule of a job.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any, Final

from redis.asyncio import Redis
from saq import Job as Delivery
from saq import Status, Worker
from saq.queue.redis import RedisQueue

from trainer.jobs.errors import JobStoreUnavailable
from trainer.jobs.lease import Lease
from trainer.jobs.redis_call import redis_call
from trainer.jobs.turns import Turns, Work, turns_from, work_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.jobs.base import AnyJob, Handler
    from trainer.jobs.record import Job
    from trainer.jobs.turns import WeightOf

NAME: Final = "prefixd-trainer"
FUNCTION: Final = "run"
WAIT_S: Final = 1.0
"""A worker waits this long for a delivery before it asks again; less than the client's time-out."""
PATIENCE: Final = 5.0
"""Factor on the client's time-out, so that it exceeds ``WAIT_S``."""
STOP_S: Final = 30.0
LIVING: Final = frozenset({Status.NEW, Status.QUEUED, Status.ACTIVE})
TURNS: Final = "prefixd-trainer:turns"

# KEYS: turns, deliveries that wait, those that workers have. ARGV: expected and new turns ("" for none), the delivery
# to take ("" for none). Returns 1, or 0 if the turns are not the expected ones or the delivery does not wait.
TAKE: Final = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if ARGV[3] ~= '' then
  if redis.call('LREM', KEYS[2], 1, ARGV[3]) == 0 then return 0 end
  redis.call('RPUSH', KEYS[3], ARGV[3])
end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""

_log = logging.getLogger("prefixd.trainer")


class SaqQueue:
    """A Queue over a client of the same event loop."""

    def __init__(
        self, client: Redis, worker: str, weight_of: WeightOf, *, lease_s: int, stop_s: float = STOP_S
    ) -> None:
        """``close`` closes ``client``. ``Lease`` says when a silent worker is lost under a lease of ``lease_s``.

        ``stop_s`` is the time that a handler gets to hand its job back when its worker ends.
        """
        self._queue = _Deliveries(client, NAME, weight_of)
        self._worker, self._lease_s, self._stop_s = worker, lease_s, stop_s
        self._running: dict[str, Delivery] = {}

    async def put(self, job: Job) -> None:
        """See Queue."""
        work = work_of(job)
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
                    meta={"begins": work.begins, "ends": work.ends, "batch": work.batch},
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

    async def settle(self, job_id: str, step: int) -> None:
        """See Queue."""
        async with redis_call():
            await self._queue.settle(job_id, step)

    async def unsettled(self) -> list[Work]:
        """See Queue."""
        async with redis_call():
            turns, _ = await self._queue.turns()
        return [charge.work for charge in turns.charges.values()]

    async def close(self) -> None:
        """See Queue."""
        await self._queue.disconnect()


class _Worker(Worker[Any]):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.SIGNALS = []  # the process handles signals


class _Deliveries(RedisQueue):
    """SAQ's queue but for three things: tenants take turns, it waits for a Redis that is away, and a sweep never
    delivers again.
    """

    def __init__(self, client: Redis, name: str, weight_of: WeightOf) -> None:
        super().__init__(client, name)
        self._weight_of = weight_of
        self._script = client.register_script(TAKE)
        self._known: dict[bytes, Work] = {}  # what waits; a delivery's work never changes
        self._suspects: set[bytes] = set()

    def __repr__(self) -> str:
        return f"<deliveries of {self.name}>"  # SAQ logs it; the default one shows the address of the Redis

    async def dequeue(self, timeout: float = 0.0, poll_interval: float = 0.0) -> Delivery | None:
        try:
            async with redis_call():  # the move, from the list's head to its head, waits until something is there
                if await self.redis.blmove(self._queued, self._queued, timeout, "LEFT", "LEFT") is None:
                    return None
                return await self._take()
        except JobStoreUnavailable:
            await asyncio.sleep(WAIT_S)
            return None

    async def turns(self) -> tuple[Turns, bytes]:
        """Those of now, and their text."""
        text = await self.redis.get(TURNS)
        return (Turns(), b"") if text is None else (turns_from(text), text)

    async def settle(self, job_id: str, step: int) -> None:
        """See Queue."""
        while True:
            turns, text = await self.turns()
            after = turns.settled(job_id, step)
            if after is turns or await self._write(text, after):
                return

    async def _take(self) -> Delivery | None:
        while True:
            turns, text = await self.turns()
            members = await self.redis.lrange(self._queued, 0, -1)
            waiting = await self._works(members)
            if not waiting:
                return None
            taken, after = turns.next(list(waiting.values()), self._weight_of)
            member = list(waiting)[taken]
            if await self._write(text, after, member):
                return await self._get_job_by_id(member)

    async def _works(self, members: list[bytes]) -> dict[bytes, Work]:
        """What the deliveries ask for, in their order. Those without a record leave the list."""
        new = [member for member in members if member not in self._known]
        for member, text in zip(new, await self.redis.mget(new) if new else (), strict=True):
            delivery = self.deserialize(text)
            if delivery is None:
                await self.redis.lrem(self._queued, 0, member)
            else:
                asked = delivery.kwargs or {}
                self._known[member] = Work(asked["tenant"], asked["job_id"], **(delivery.meta or {}))
        self._known = {member: self._known[member] for member in members if member in self._known}
        return self._known

    async def _write(self, before: bytes, after: Turns, take: bytes = b"") -> bool:
        """Whether the turns still were ``before`` and the delivery to take, if any, waited."""
        keys = [TURNS, self._queued, self._active]
        return bool(await self._script(keys=keys, args=[before, json.dumps(after.as_dict()), take]))

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
