"""What every process asks a JobStore for every few seconds, and how many open jobs a tenant may have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from prefixes.errors import QueueFull, QuotaExceeded
from prefixes.registry.redis.url import parse_redis_url
from tests.support.redis_server import RedisServer
from trainer.jobs.base import JobStore
from trainer.jobs.disk_store import DiskJobStore
from trainer.jobs.job import cancelled, claimed, lost, new_job, retried
from trainer.jobs.redis_store import OPEN, RedisJobStore
from trainer.jobs.room import Room

LARGE: Final = "x" * 50_000


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@asynccontextmanager
async def opened(kind: str, folder: Path, redis: RedisServer) -> AsyncIterator[JobStore]:
    redis.flush()
    store: JobStore = (
        DiskJobStore(folder) if kind == "disk" else RedisJobStore(parse_redis_url(redis.url).connect_asyncio())
    )
    try:
        yield store
    finally:
        await store.close()


KINDS = pytest.mark.parametrize("kind", ["disk", "redis"])


def a_job(tenant: str = "acme") -> Any:
    return new_job(tenant, f"tenant:{tenant}", {"task": f"{tenant}/e2e", "template": LARGE, "dataset": "sha256:1"})


def test_a_look_at_the_queue_reads_no_record_and_moves_few_bytes(tmp_path: Path, redis: RedisServer) -> None:
    """Every trainer read every record whole every two seconds: 1,000 jobs with large templates were 100 MB."""
    jobs = 40

    def counted() -> tuple[int, int]:
        with redis.client() as client:
            calls = client.info("commandstats")
            reads = sum(calls.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("get", "mget"))
            return reads, client.info("stats")["total_net_output_bytes"]

    async def test() -> None:
        async with opened("redis", tmp_path, redis) as store:
            for _ in range(jobs):
                await store.create(a_job())
            reads, sent = counted()
            found = await store.open_jobs()
            reads_then, sent_then = counted()
            assert len(found) == jobs
            assert reads_then - reads == 0
            # Beside them only the two answers about the counts themselves, some 10 kB each.
            assert sent_then - sent < 40_000 + 600 * jobs < jobs * len(LARGE) / 10

    asyncio.run(test())


@KINDS
def test_a_look_tells_the_newest_of_each_job_and_what_it_needs(kind: str, tmp_path: Path, redis: RedisServer) -> None:
    async def test() -> None:
        async with opened(kind, tmp_path, redis) as store:
            one, other = await store.create(a_job()), await store.create(a_job("other"))
            await store.change("acme", one.id, lambda job: claimed(job, 1, "m"))
            await store.change("acme", one.id, lambda job: lost(job, 1))
            looks = {look.id: (look.tenant, look.state, look.token, look.datasets) for look in await store.open_jobs()}
            assert looks == {
                one.id: ("acme", "queued", 2, ("sha256:1",)),
                other.id: ("other", "queued", 1, ("sha256:1",)),
            }
            assert [look.id for look in await store.open_jobs("other")] == [other.id]

    asyncio.run(test())


@KINDS
def test_a_tenant_cannot_open_more_jobs_than_it_may_at_once(kind: str, tmp_path: Path, redis: RedisServer) -> None:
    """The jobs were counted first and written later: of ten that came together, ten passed."""

    async def test() -> None:
        async with opened(kind, tmp_path, redis) as store:
            tried = await asyncio.gather(
                *(store.create(a_job(), Room(most=3)) for _ in range(10)), return_exceptions=True
            )
            refused = [error for error in tried if isinstance(error, QueueFull)]
            assert len(refused) == 7 and refused[0].detail["expected"] == 3
            assert len(await store.open_jobs()) == 3
            await store.create(a_job("other"), Room(most=3))

            made = [job.id for job in await store.open_jobs("acme")]
            await store.change("acme", made[0], cancelled)
            await store.create(a_job(), Room(most=3))
            with pytest.raises(QueueFull):
                await store.change("acme", made[0], retried, Room(most=3))
            assert (await store.get("acme", made[0])).state == "cancelled"
            await store.change("acme", made[1], cancelled)
            assert (await store.change("acme", made[0], retried, Room(most=3))).state == "queued"
            await store.change("acme", made[2], lambda job: claimed(job, 1, "m"), Room(most=3))  # opens nothing

    asyncio.run(test())


@KINDS
def test_a_tenants_and_a_keys_limits_hold_in_the_same_step(kind: str, tmp_path: Path, redis: RedisServer) -> None:
    def job(key: str) -> Any:
        return new_job("acme", "me", {"template": LARGE}, key)

    async def test() -> None:
        async with opened(kind, tmp_path, redis) as store:
            room = Room(most=9, of_tenant=4, of_key=2)
            tried = await asyncio.gather(
                *(store.create(job(key), room) for key in ("one", "two") * 5), store.create(job("three"), room),
                return_exceptions=True,
            )  # fmt: skip
            refused = [error for error in tried if isinstance(error, QuotaExceeded)]
            assert len(refused) == 7
            assert {error.detail["of"] for error in refused} <= {"tenant", "key"}
            found = await store.open_jobs("acme")
            assert sorted(one.key_id or "" for one in found) == ["one", "one", "two", "two"]

            await store.change("acme", found[0].id, cancelled)
            with pytest.raises(QuotaExceeded) as caught:
                await store.create(job("two" if found[0].key_id == "one" else "one"), room)
            assert caught.value.detail == {"limit": "open_jobs", "of": "key", "expected": 2, "got": 3}
            with pytest.raises(QueueFull):
                await store.create(job("three"), Room(most=3, of_tenant=4, of_key=2))
            await store.change("acme", found[0].id, lambda job: retried(job, "me", "three"), room)
            with pytest.raises(QuotaExceeded) as caught:
                await store.create(job("three"), room)
            assert caught.value.detail == {"limit": "open_jobs", "of": "tenant", "expected": 4, "got": 5}
            await store.create(new_job("other", "me", {}, "one"), room)

    asyncio.run(test())


def test_what_an_older_trainer_ended_holds_no_place_and_what_it_made_is_seen(
    tmp_path: Path, redis: RedisServer
) -> None:
    """Its script knows the record and the list of open jobs, not the hash that is counted."""

    async def test() -> None:
        async with opened("redis", tmp_path, redis) as store:
            ended, left = [await store.create(a_job(), Room(most=2)) for _ in range(2)]
            with redis.client() as client:
                client.zrem(OPEN, f"acme/{ended.id}")
            assert [look.id for look in await store.open_jobs()] == [left.id]
            new = await store.create(a_job(), Room(most=2))
            with pytest.raises(QueueFull):
                await store.create(a_job(), Room(most=2))
            with redis.client() as client:
                client.hdel(f"{OPEN}:acme", left.id)
            assert [look.id for look in await store.open_jobs()] == [left.id, new.id]

    asyncio.run(test())
