"""Every Queue lets tenants take turns, by what their jobs take. Proven by the order of starts, never by time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest

from tests.contract.test_job_queue import PATIENCE_S, Hands, Place, place, redis, until, working
from trainer.jobs.base import Queue
from trainer.jobs.job import new_job
from trainer.jobs.record import Job

__all__ = ["place", "redis"]

FLOOD = 200


def jobs(tenant: str, count: int, steps: int = 1, batch: int = 1) -> list[Job]:
    """Of so many steps each, the oldest first."""
    return [new_job(tenant, "me", {"config": {"batch_size": batch}}, None, steps).job for _ in range(count)]


async def put(queue: Queue, deliveries: Iterable[Job]) -> None:
    for job in deliveries:
        await queue.put(job)


@dataclass
class Starts:
    """The jobs that workers started, in their order. A delivery that comes again starts nothing."""

    reached: Callable[[str], int] | None = None
    """The step at which a tenant's jobs end; without it they are not settled."""
    ids: list[str] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)

    async def next(self, queue: Queue, count: int) -> list[str]:
        """The tenants of the next ``count`` jobs that a worker starts, one at a time."""
        begun, done = len(self.ids), asyncio.Event()

        async def take(tenant: str, job_id: str, token: int) -> None:
            if job_id in self.ids:
                return
            self.ids.append(job_id)
            self.tenants.append(tenant)
            if self.reached is not None:
                await queue.settle(job_id, self.reached(tenant))
            if len(self.ids) == begun + count:
                done.set()
                await asyncio.Event().wait()

        work = asyncio.create_task(queue.work(take, 1))
        try:
            await done.wait()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        return self.tenants[begun:]


def test_a_flood_does_not_make_another_tenants_job_wait_for_it(place: Place) -> None:
    """It was first come, first served: one job behind a thousand started as the thousand-and-first."""

    async def test(queue: Queue) -> None:
        starts = Starts()
        await put(queue, [*jobs("flood", FLOOD), *jobs("small", 1)])
        assert "small" in await starts.next(queue, 2)

    place.run(test)


def test_one_that_comes_into_a_flood_that_runs_is_next_or_the_one_after(place: Place) -> None:
    async def test(queue: Queue) -> None:
        starts = Starts()
        await put(queue, jobs("flood", FLOOD))
        assert set(await starts.next(queue, 20)) == {"flood"}
        await put(queue, jobs("small", 1))
        assert "small" in await starts.next(queue, 2)

    place.run(test)


def test_tenants_start_jobs_by_their_weights_and_each_its_oldest_first(place: Place) -> None:
    place.weights = {"double": 2.0}

    async def test(queue: Queue) -> None:
        mine = {"single": jobs("single", 30), "double": jobs("double", 30)}
        await put(queue, [*mine["single"], *mine["double"]])
        hands = Hands()
        hands.open.set()
        async with working(queue, hands):
            await until(lambda: len(hands.got) >= 30)
        for end in range(1, 31):
            counts = Counter(tenant for tenant, _, _ in hands.got[:end])
            assert abs(counts["double"] / 2 - counts["single"]) <= 1, hands.got[:end]
        for tenant, theirs in mine.items():
            got = [job_id for owner, job_id, _ in hands.got if owner == tenant]
            assert got == [job.id for job in theirs][: len(got)]

    place.run(test)


def test_a_job_costs_its_examples_and_not_one_turn(place: Place) -> None:
    async def test(queue: Queue) -> None:
        starts = Starts()
        await put(queue, [*jobs("large", 30, steps=10, batch=4), *jobs("small", 90, steps=5, batch=2)])
        counts = Counter(await starts.next(queue, 50))
        assert counts["large"] in (10, 11), counts  # 40 examples for each 10 of the small ones

    place.run(test)


def test_what_a_job_did_not_take_is_given_back(place: Place) -> None:
    """One tenant's jobs fail at once, of 100 steps each; they cost it next to nothing."""

    async def test(queue: Queue) -> None:
        await put(queue, [*jobs("fails", 30, steps=100), *jobs("works", 30, steps=100)])
        reached = {"fails": 0, "works": 100}
        started = await Starts(reached.__getitem__).next(queue, 20)
        assert Counter(started)["works"] <= 2, started
        assert len(await queue.unsettled()) == 0

    place.run(test)


def test_a_job_is_charged_once_however_often_it_is_delivered(place: Place) -> None:
    async def test(queue: Queue) -> None:
        starts = Starts()
        (long,) = jobs("one", 1, steps=10)
        await put(queue, [long, *jobs("two", 12, steps=5)])
        assert await starts.next(queue, 1) == ["one"]
        await put(queue, [replace(long, token=2), *jobs("one", 3, steps=10)])
        assert [work.job_id for work in await queue.unsettled()] == [long.id]
        # The delivery of the lost worker's job costs nothing: three short ones, then one of ten steps for each two.
        assert await starts.next(queue, 8) == ["two"] * 3 + ["one"] + ["two"] * 2 + ["one"] + ["two"]

    place.run(test)


def test_a_job_is_settled_once_and_an_unknown_one_never(place: Place) -> None:
    async def test(queue: Queue) -> None:
        starts = Starts()
        one, other = jobs("one", 2, steps=10)
        await put(queue, [one, *jobs("two", 30, steps=1), other])
        assert await starts.next(queue, 1) == ["one"]
        for job_id, step in ((one.id, 4), (one.id, 0), (other.id, 0), ("job-unknown", 0)):
            await queue.settle(job_id, step)
        assert await queue.unsettled() == []
        started = await starts.next(queue, 6)
        assert started.index("one") in (4, 5), started  # four steps were charged

    place.run(test)


def test_whose_turn_it_is_outlives_a_restart(place: Place) -> None:
    async def test() -> None:
        waiting, starts = [*jobs("large", 5, steps=40), *jobs("small", 60)], Starts()
        for _ in range(4):
            async with place.open() as queue, asyncio.timeout(PATIENCE_S):
                await put(queue, [job for job in waiting if job.id not in starts.ids])
                await starts.next(queue, 9)
        assert Counter(starts.tenants) == {"large": 1, "small": 35}, starts.tenants

    asyncio.run(test())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"counters": {}, "charges": {"j": {"work": {"new": 1}}}}'])
def test_turns_that_cannot_be_read_count_as_none_and_jobs_go_on(place: Place, text: str) -> None:
    """They held up every job for ever, where they are kept in Redis."""
    place.spoil(text)

    async def test(queue: Queue) -> None:
        starts = Starts()
        assert await queue.unsettled() == []
        await put(queue, jobs("one", 2))
        assert await starts.next(queue, 2) == ["one", "one"]
        assert {work.job_id for work in await queue.unsettled()} == set(starts.ids)

    place.run(test)


def test_several_workers_share_one_order(place: Place) -> None:
    """Each tenant's starts are never further apart than one job, whichever worker took which."""

    async def test(queue: Queue) -> None:
        names = ("a", "b", "c")
        await put(queue, [job for name in names for job in jobs(name, 20)])
        started: list[str] = []

        async def take(tenant: str, job_id: str, token: int) -> None:
            started.append(tenant)
            await asyncio.sleep(0)

        works: list[asyncio.Task[None]] = []
        async with place.open("two") as second:
            queues = [queue] if place.kind == "local" else [queue, second]
            works = [asyncio.create_task(one.work(take, 3)) for one in queues]
            try:
                await until(lambda: len(started) == 60)
            finally:
                for work in works:
                    work.cancel()
                await asyncio.gather(*works, return_exceptions=True)
        # What several workers take at once may be noted in another order than it was taken in.
        slack = 1 + 3 * len(works)
        for end in range(1, 61):
            counts = Counter(started[:end])
            assert max(counts[name] for name in names) - min(counts[name] for name in names) <= slack

    place.run(test)


def test_who_was_away_has_saved_up_nothing(place: Place) -> None:
    async def test(queue: Queue) -> None:
        starts = Starts()
        await put(queue, jobs("back", 1))
        assert await starts.next(queue, 1) == ["back"]
        await put(queue, jobs("busy", 100))
        assert set(await starts.next(queue, 50)) == {"busy"}
        await put(queue, jobs("back", 50))
        counts = Counter(await starts.next(queue, 20))
        assert abs(counts["back"] - counts["busy"]) <= 2

    place.run(test)


def test_an_idle_worker_takes_what_comes_whoever_had_much(place: Place) -> None:
    """Turns order what waits; they hold nobody back."""

    async def test(queue: Queue) -> None:
        starts = Starts()
        for _ in range(3):
            await put(queue, jobs("only", 1, steps=1000))
            assert await starts.next(queue, 1) == ["only"]

    place.run(test)
