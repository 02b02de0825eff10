"""Every Queue keeps the promises of trainer/jobs/base.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from prefixes.registry.redis.url import parse_redis_url
from tests.support.redis_server import RedisServer
from trainer.jobs.base import Queue
from trainer.jobs.job import new_job
from trainer.jobs.local_queue import LocalQueue
from trainer.jobs.record import Job
from trainer.jobs.saq_queue import NAME, PATIENCE, TURNS, SaqQueue

KINDS = ("local", "redis")
LEASE_S = 2
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@dataclass
class Hands:
    """A worker's: notes what it gets, and holds it until it is let go."""

    got: list[tuple[str, str, int]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False

    async def take(self, tenant: str, job_id: str, token: int) -> None:
        self.got.append((tenant, job_id, token))
        if self.broken:
            raise RuntimeError("a defect")
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(job_id)
            raise


class Place:
    """``weights`` are the tenants' that have another than 1."""

    def __init__(self, kind: str, redis: RedisServer, folder: Path) -> None:
        self.kind, self._redis, self._file = kind, redis, folder / "turns.json"
        self.weights: dict[str, float] = {}
        redis.flush()

    def weight_of(self, tenant: str) -> float:
        return self.weights.get(tenant, 1.0)

    @asynccontextmanager
    async def open(self, worker: str = "one") -> AsyncIterator[Queue]:
        queue: Queue = LocalQueue(self._file, self.weight_of) if self.kind == "local" else self._saq(worker)
        try:
            yield queue
        finally:
            await queue.close()

    def spoil(self, text: str) -> None:
        """Write what is not Turns where they are kept."""
        if self.kind == "local":
            self._file.write_text(text)
        else:
            with parse_redis_url(self._redis.url).connect() as client:
                client.set(TURNS, text)

    def _saq(self, worker: str) -> SaqQueue:
        client = parse_redis_url(self._redis.url).connect_asyncio(patience=PATIENCE)
        return SaqQueue(client, worker, self.weight_of, lease_s=LEASE_S)

    def run(self, test: Callable[[Queue], Awaitable[None]]) -> None:
        async def body() -> None:
            async with self.open() as queue, asyncio.timeout(PATIENCE_S):
                await test(queue)

        asyncio.run(body())


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, redis: RedisServer, tmp_path: Path) -> Place:
    return Place(request.param, redis, tmp_path)


def job(name: str = "acme") -> Job:
    return new_job(name, "me", {}).job


@asynccontextmanager
async def working(queue: Queue, hands: Hands, concurrency: int = 1) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.work(hands.take, concurrency))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def alive(queue: Queue, delivered: Job) -> bool:
    return not await queue.dead([delivered])


async def until(reached: Callable[[], Any]) -> None:
    while not reached():
        await asyncio.sleep(0.01)


def test_deliveries_arrive_in_their_order_and_say_which_job_under_which_token(place: Place) -> None:
    async def test(queue: Queue) -> None:
        jobs, hands = [job() for _ in range(4)], Hands()
        jobs[2] = replace(jobs[2], token=7)
        hands.open.set()
        for one in jobs:
            await queue.put(one)
        async with working(queue, hands):
            await until(lambda: len(hands.got) == 4)
        assert hands.got == [(one.tenant, one.id, one.token) for one in jobs]

    place.run(test)


def test_a_delivery_that_is_put_twice_is_delivered_once(place: Place) -> None:
    async def test(queue: Queue) -> None:
        one, other, hands = job(), job(), Hands()
        hands.open.set()
        for delivery in (one, one, one, other):
            await queue.put(delivery)
        async with working(queue, hands):
            await until(lambda: len(hands.got) == 2)
            await asyncio.sleep(0.1)
        assert [got[1] for got in hands.got] == [one.id, other.id]

    place.run(test)


def test_only_so_many_run_at_once(place: Place) -> None:
    async def test(queue: Queue) -> None:
        hands = Hands()
        for _ in range(5):
            await queue.put(job())
        async with working(queue, hands, concurrency=2):
            await until(lambda: len(hands.got) == 2)
            await asyncio.sleep(0.2)
            assert len(hands.got) == 2
            hands.open.set()
            await until(lambda: len(hands.got) == 5)

    place.run(test)


def test_a_delivery_lives_from_its_putting_to_its_end(place: Place) -> None:
    async def test(queue: Queue) -> None:
        one, hands = job(), Hands()
        assert not await alive(queue, one)
        await queue.put(one)
        assert await alive(queue, one)
        assert not await alive(queue, replace(one, token=2))
        async with working(queue, hands):
            await until(lambda: hands.got)
            assert await alive(queue, one)
            hands.open.set()
            while await alive(queue, one):
                await asyncio.sleep(0.01)

    place.run(test)


def test_a_handler_with_a_defect_costs_its_own_delivery_alone(place: Place) -> None:
    async def test(queue: Queue) -> None:
        one, other, hands = job(), job(), Hands(broken=True)
        await queue.put(one)
        async with working(queue, hands):
            await until(lambda: hands.got)
            hands.broken = False
            hands.open.set()
            await queue.put(other)
            await until(lambda: len(hands.got) == 2)
            while await alive(queue, one):
                await asyncio.sleep(0.01)

    place.run(test)


def test_what_runs_when_the_work_is_cancelled_is_cancelled_and_awaited(place: Place) -> None:
    async def test(queue: Queue) -> None:
        one, hands = job(), Hands()
        await queue.put(one)
        async with working(queue, hands):
            await until(lambda: hands.got)
        assert hands.cancelled == [one.id]

    place.run(test)


def test_what_was_cancelled_is_dead_and_comes_to_nobody_again(place: Place) -> None:
    """Its job was handed back under the next token; the old delivery waited all the same, and took a turn."""

    async def test(queue: Queue) -> None:
        one, other, hands, later = job(), job(), Hands(), Hands()
        await queue.put(one)
        async with working(queue, hands):
            await until(lambda: hands.got)
        assert not await alive(queue, one)
        await queue.put(other)
        async with place.open("two") as second, working(queue if place.kind == "local" else second, later):
            await until(lambda: later.got)
            later.open.set()
            await asyncio.sleep(0.1)
        assert [got[1] for got in later.got] == [other.id]

    place.run(test)


def test_of_many_deliveries_the_dead_are_told_in_their_order(place: Place) -> None:
    async def test(queue: Queue) -> None:
        jobs = [job() for _ in range(9)]
        for one in jobs[::2]:
            await queue.put(one)
        assert await queue.dead(jobs) == jobs[1::2]
        assert await queue.dead([]) == []

    place.run(test)


# --- Redis alone ---


def test_who_beats_lives_and_who_falls_silent_is_lost(redis: RedisServer, tmp_path: Path) -> None:
    place = Place("redis", redis, tmp_path)

    async def test(queue: Queue) -> None:
        one, hands = job(), Hands()
        await queue.put(one)
        async with working(queue, hands):
            await until(lambda: hands.got)
            for _ in range(LEASE_S * 4):
                await queue.heartbeat(one)
                await asyncio.sleep(0.5)
                assert await alive(queue, one)
            while await alive(queue, one):
                await asyncio.sleep(0.1)
            await queue.put(replace(one, token=2))  # what was lost is delivered under another token
            await queue.heartbeat(one)  # it wakes up
            assert await alive(queue, replace(one, token=2))

    place.run(test)


def test_a_delivery_taken_by_a_worker_that_dies_in_that_moment_is_found(redis: RedisServer, tmp_path: Path) -> None:
    place = Place("redis", redis, tmp_path)

    async def test(queue: Queue) -> None:
        one, hands = job(), Hands()
        await queue.put(one)
        with redis.client() as client:  # what a worker does first, and no more
            assert client.lmove(f"saq:{NAME}:queued", f"saq:{NAME}:active", "LEFT", "RIGHT")
        async with working(queue, hands):  # the others sweep
            while await alive(queue, one):
                await asyncio.sleep(0.1)
            await queue.put(one)
            await until(lambda: hands.got)

    place.run(test)


def test_two_workers_share_what_waits_and_nothing_is_a_pickle(redis: RedisServer, tmp_path: Path) -> None:
    place = Place("redis", redis, tmp_path)

    async def test(queue: Queue) -> None:
        async with place.open("two") as second:
            one, two = Hands(), Hands()
            async with working(queue, one), working(second, two):
                for _ in range(2):
                    await queue.put(job())
                await until(lambda: len(one.got) + len(two.got) == 2)
                assert len(one.got) == len(two.got) == 1
                with redis.client() as client:
                    for key in client.keys("saq:job:*"):
                        assert client.get(key).startswith(b'{"')

    place.run(test)


def test_a_redis_that_was_away_is_worked_for_again(redis: RedisServer, tmp_path: Path) -> None:
    place = Place("redis", redis, tmp_path)

    async def test(queue: Queue) -> None:
        hands = Hands()
        hands.open.set()
        async with working(queue, hands):
            await queue.put(job())
            await until(lambda: hands.got)
            await asyncio.to_thread(redis.kill)
            await asyncio.sleep(1)
            await asyncio.to_thread(redis.start)
            await queue.put(job())
            await until(lambda: len(hands.got) == 2)

    place.run(test)
