"""Jobs in Redis, for any number of service processes and workers.

    prefixd-trainer:job:<tenant>:<id>     the record, JSON
    prefixd-trainer:jobs:<tenant>         sorted set of the tenant's job ids, which sort by time
    prefixd-trainer:open                  sorted set of <tenant>/<id> of queued and running jobs, by time of queueing
    prefixd-trainer:open:<tenant>         hash of the tenant's among them: id -> OpenJob. An older trainer's changes do
                                          not reach it: what it lacks is read from the record, what it has too much goes
    prefixd-trainer:events:<id>           stream of events
    prefixd-trainer:changed               channel: the id of every job that changed

One script makes every change. It compares the record with the one that the change was planned on, and writes record,
indexes and events, or nothing. Owns these keys; knows no rule of a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Final

from redis.asyncio import Redis

from trainer.jobs.base import MAX_EVENTS, PAGE, Plan
from trainer.jobs.errors import JobNotFound, JobStoreUnavailable
from trainer.jobs.job import require_deletable
from trainer.jobs.open_job import OpenJob, open_job_from, open_job_of
from trainer.jobs.record import Change, Event, Job, State, job_from
from trainer.jobs.redis_call import redis_call
from trainer.jobs.room import UNBOUNDED, Room
from trainer.jobs.signals import Signals, Watch

PREFIX: Final = "prefixd-trainer:"
RECORD: Final = f"{PREFIX}job:"
TENANT: Final = f"{PREFIX}jobs:"
OPEN: Final = f"{PREFIX}open"
CHANGED: Final = f"{PREFIX}changed"
RECONNECT_S: Final = 0.5
OPEN_PAGE: Final = 1000
"""Open jobs that are looked at at once; each is a few hundred bytes."""

# KEYS: record, the tenant's jobs, open jobs, events, the tenant's open jobs. ARGV: expected and new record ("" for
# none), job id, member of the open jobs, its time ("" for a job that is not open), its OpenJob, "1" to count the open
# jobs beside it, the job's key, the three bounds of Room ("" for any number), largest number of events, then name and
# JSON of each event. Returns 1; 0 if the record is not the expected one; 0 and the open jobs of the tenant and of the
# key if there is no room.
CHANGE: Final = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return {0} end
if ARGV[7] ~= '' and ARGV[5] ~= '' and not redis.call('ZSCORE', KEYS[3], ARGV[4]) then
  local function beside()
    local of_tenant, of_key = redis.call('HLEN', KEYS[5]), 0
    if ARGV[11] ~= '' and ARGV[8] ~= '' then
      for _, text in ipairs(redis.call('HVALS', KEYS[5])) do
        if cjson.decode(text)['key_id'] == ARGV[8] then of_key = of_key + 1 end
      end
    end
    return of_tenant, of_key
  end
  local function full(of_tenant, of_key)
    local most, tenant, key = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
    return (most and of_tenant >= most) or (tenant and of_tenant >= tenant) or (key and of_key >= key)
  end
  local of_tenant, of_key = beside()
  if full(of_tenant, of_key) then
    local tenant = string.sub(ARGV[4], 1, #ARGV[4] - #ARGV[3])
    for _, id in ipairs(redis.call('HKEYS', KEYS[5])) do
      if not redis.call('ZSCORE', KEYS[3], tenant .. id) then redis.call('HDEL', KEYS[5], id) end
    end
    of_tenant, of_key = beside()
    if full(of_tenant, of_key) then return {0, of_tenant, of_key} end
  end
end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[1], KEYS[4])
  redis.call('ZREM', KEYS[2], ARGV[3])
else
  redis.call('SET', KEYS[1], ARGV[2])
  redis.call('ZADD', KEYS[2], 0, ARGV[3])
end
if ARGV[5] == '' then
  redis.call('ZREM', KEYS[3], ARGV[4])
  redis.call('HDEL', KEYS[5], ARGV[3])
else
  redis.call('ZADD', KEYS[3], ARGV[5], ARGV[4])
  redis.call('HSET', KEYS[5], ARGV[3], ARGV[6])
end
for i = 13, #ARGV, 2 do
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[12], '*', 'name', ARGV[i], 'data', ARGV[i + 1])
end
redis.call('PUBLISH', 'prefixd-trainer:changed', ARGV[3])
return {1}
"""

_log = logging.getLogger("prefixd.trainer")


class RedisJobStore:
    """A JobStore over a client of the same event loop."""

    def __init__(self, client: Redis) -> None:
        """``close`` closes ``client``."""
        self._client = client
        self._script = client.register_script(CHANGE)
        self._signals = Signals()
        self._listening = asyncio.create_task(self._listen())

    async def create(self, change: Change, room: Room = UNBOUNDED) -> Job:
        """See JobStore."""
        written = await self._write(None, change, room)
        if not written and await self.get(change.job.tenant, change.job.id) != change.job:
            raise JobStoreUnavailable(f"{change.job.id}: expected a new id, found a job that has it")
        return change.job  # also if the record was there: the first answer was lost, and the client sent it again

    async def get(self, tenant: str, job_id: str) -> Job:
        """See JobStore."""
        job, _ = await self._read(tenant, job_id)
        return job

    async def change(self, tenant: str, job_id: str, plan: Plan, room: Room = UNBOUNDED) -> Job:
        """See JobStore."""
        while True:
            before, text = await self._read(tenant, job_id)
            change = plan(before)
            same = change.job == before and not change.events
            if same or await self._write(text, change, room):
                return change.job

    async def jobs(
        self, tenant: str | None, *, limit: int, before: str | None = None, state: State | None = None
    ) -> list[Job]:
        """See JobStore."""
        found: list[Job] = []
        tenants = [tenant] if tenant is not None else [key.removeprefix(TENANT) for key in await self._named(TENANT)]
        while len(found) < limit:
            size = min(PAGE, limit - len(found)) if state is None else PAGE
            newest = await self._newest(tenants, before, size)
            async with redis_call():
                read = await self._many([_key(owner, job_id) for job_id, owner in newest])
            found += [job for job in read if state in (None, job.state)]
            if len(newest) < size:
                break
            before = newest[-1][0]
        return found[:limit]

    async def owner(self, job_id: str) -> str:
        """See JobStore."""
        for key in await self._named(RECORD):
            tenant, _, name = key.removeprefix(RECORD).partition(":")
            if name == job_id:
                return tenant
        raise JobNotFound(job_id)

    async def open_jobs(self, tenant: str | None = None) -> list[OpenJob]:
        """See JobStore."""
        async with redis_call():
            members = [member.decode().partition("/") for member in await self._client.zrange(OPEN, 0, -1)]
            wanted = [(owner, job_id) for owner, _, job_id in members if tenant in (None, owner)]
            found: list[OpenJob] = []
            for first in range(0, len(wanted), OPEN_PAGE):
                found += await self._open(wanted[first : first + OPEN_PAGE])
            return found

    async def events(self, tenant: str, job_id: str, after: str | None = None) -> list[Event]:
        """See JobStore."""
        await self._read(tenant, job_id)
        past = f"({after}" if after is not None and re.fullmatch(r"[0-9]{1,16}-[0-9]{1,10}", after) else "-"
        async with redis_call():
            entries = await self._client.xrange(_events_key(job_id), min=past)
        return await asyncio.to_thread(_events_of, entries)  # 3 MB of a long job, for whoever watches from the first

    def watch(self, job_id: str) -> AbstractContextManager[Watch]:
        """See JobStore."""
        return self._signals.watch(job_id)

    async def delete(self, tenant: str, job_id: str) -> Job:
        """See JobStore."""
        while True:
            job, text = await self._read(tenant, job_id)
            require_deletable(job)
            if await self._write(text, Change(job), delete=True):
                return job

    async def check(self) -> None:
        """See JobStore."""
        async with redis_call():
            await self._client.ping()

    async def close(self) -> None:
        """See JobStore."""
        self._listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listening
        await self._client.aclose()

    # --- inside ---

    async def _read(self, tenant: str, job_id: str) -> tuple[Job, bytes]:
        async with redis_call():
            text = await self._client.get(_key(tenant, job_id))
        if text is None:
            raise JobNotFound(job_id)
        return job_from(json.loads(text)), text

    async def _many(self, keys: list[str]) -> list[Job]:
        texts = await self._client.mget(keys) if keys else []
        return await asyncio.to_thread(lambda: [job_from(json.loads(text)) for text in texts if text is not None])

    async def _named(self, beginning: str) -> set[str]:
        """Every key that begins so. A scan may give one more than once."""
        async with redis_call():
            return {key.decode() async for key in self._client.scan_iter(match=f"{beginning}*", count=PAGE * 10)}

    async def _newest(self, tenants: list[str], before: str | None, size: int) -> list[tuple[str, str]]:
        """The ids of the newest jobs of these tenants, ``size`` at most, each with its tenant."""
        async with redis_call(), self._client.pipeline(transaction=False) as pipe:
            for tenant in tenants:
                newest = f"({before}" if before is not None else "+"
                pipe.zrevrangebylex(_tenant_key(tenant), newest, "-", start=0, num=size)
            listed = await pipe.execute()
        found = [(i.decode(), tenant) for tenant, ids in zip(tenants, listed, strict=True) for i in ids]
        return sorted(found, reverse=True)[:size]

    async def _open(self, wanted: list[tuple[str, str]]) -> list[OpenJob]:
        """What is known of these open jobs, given as tenant and id, and still exists."""
        async with self._client.pipeline(transaction=False) as pipe:
            for tenant, job_id in wanted:
                pipe.hget(_open_key(tenant), job_id)
            texts = await pipe.execute()
        found = {one: open_job_from(text) for one, text in zip(wanted, texts, strict=True) if text is not None}
        missing = [one for one in wanted if one not in found]
        for first in range(0, len(missing), PAGE):
            read = await self._many([_key(*one) for one in missing[first : first + PAGE]])
            found |= {(job.tenant, job.id): open_job_of(job) for job in read}
        return [found[one] for one in wanted if one in found]

    async def _write(
        self, expected: bytes | None, change: Change, room: Room = UNBOUNDED, *, delete: bool = False
    ) -> bool:
        """Whether the change was made; not if the record is another than ``expected``. Raises what ``room`` does."""
        job = change.job
        queued = "" if job.ended else str(datetime.fromisoformat(job.queued_at).timestamp())
        told = [part for event in change.events for part in (event.name, json.dumps(event.data))]
        keys = [
            _key(job.tenant, job.id), _tenant_key(job.tenant), OPEN, _events_key(job.id), _open_key(job.tenant),
        ]  # fmt: skip
        record = "" if delete else json.dumps(job.as_dict())
        bounds = ["" if most is None else most for most in (room.most, room.of_tenant, room.of_key)]
        arguments = [
            expected or "", record, job.id, f"{job.tenant}/{job.id}", queued, open_job_of(job).as_text(),
            "1" if room.bounded else "", job.key_id or "", *bounds, MAX_EVENTS, *told,
        ]  # fmt: skip
        async with redis_call():
            done, *beside = await self._script(keys=keys, args=arguments)
        if beside:
            room.check(*beside)
        return bool(done)

    async def _listen(self) -> None:
        """Pass on the channel's messages. After a reconnect wake every watch: messages may have been missed."""
        while True:
            try:
                async with redis_call(), self._client.pubsub(ignore_subscribe_messages=True) as channel:
                    async with redis_call():
                        await channel.subscribe(CHANGED)
                    self._signals.send_all()
                    while True:
                        async with redis_call():
                            message = await channel.get_message(timeout=RECONNECT_S)
                        if message is not None:
                            self._signals.send(message["data"].decode())
            except JobStoreUnavailable as error:
                _log.warning("job announcements interrupted", extra={"facts": {"error": error.message}})
                await asyncio.sleep(RECONNECT_S)


def _events_of(entries: list[tuple[bytes, dict[bytes, bytes]]]) -> list[Event]:
    return [Event(e[b"name"].decode(), json.loads(e[b"data"]), event_id.decode()) for event_id, e in entries]


def _key(tenant: str, job_id: str) -> str:
    return f"{RECORD}{tenant}:{job_id}"


def _tenant_key(tenant: str) -> str:
    return f"{TENANT}{tenant}"


def _open_key(tenant: str) -> str:
    return f"{OPEN}:{tenant}"


def _events_key(job_id: str) -> str:
    return f"{PREFIX}events:{job_id}"
