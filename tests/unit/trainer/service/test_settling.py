"""A tenant's turns are charged for what its jobs took, wherever and however they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest

from prefixes.registry import open_registry
from prefixes.registry.base import Store
from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.datasets import lines
from tests.unit.trainer.service.test_worker import a_worker
from trainer.jobs.base import Handler
from trainer.jobs.job import cancelled, claimed, failed, lost, new_job, progressed
from trainer.jobs.local_queue import LocalQueue
from trainer.jobs.record import Failure, Job
from trainer.service.app import create_public
from trainer.service.assembly import assemble
from trainer.service.progress_writer import ProgressWriter
from trainer.service.settings import TrainerSettings
from trainer.service.worker import Worker

CONFIG = {"task": "acme/e2e", "config": {"batch_size": 2}}


@pytest.fixture
def settings(tmp_path: Path) -> TrainerSettings:
    given = {"data": tmp_path / "data", "registry": str(tmp_path / "registry"), "backbone": ["tiny=/unused"]}
    return load_settings(TrainerSettings, given, config=None)


@pytest.fixture
def registry(settings: TrainerSettings) -> Iterator[Store]:
    with closing(open_registry(settings.registry)) as made:
        yield made


@asynccontextmanager
async def working(worker: Worker, handle: Handler, count: int) -> AsyncIterator[None]:
    """Deliveries of the worker's queue go to ``handle``, so many at once, until the block ends."""
    work = asyncio.create_task(worker.queue.work(handle, count))
    try:
        yield
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


@asynccontextmanager
async def taken(worker: Worker, tenant: str = "acme", steps: int = 10) -> AsyncIterator[Job]:
    """A job of ``tenant`` that a worker has taken from the queue, and holds until the block ends."""
    job = await worker.store.create(new_job(tenant, "me", CONFIG, None, steps))
    await worker.queue.put(job)
    got, over = asyncio.Event(), asyncio.Event()

    async def take(*delivery: object) -> None:
        got.set()
        await over.wait()

    async with working(worker, take, 1):
        await got.wait()
        yield await worker.store.change(tenant, job.id, lambda found: claimed(found, 1, worker.name))


def charged(worker: Worker, tenant: str = "acme") -> float:
    assert isinstance(worker.queue, LocalQueue)
    return worker.queue._turns.of(tenant)


def run(settings: TrainerSettings, registry: Store, test: Callable[[Worker], Awaitable[None]]) -> None:
    async def body() -> None:
        async with a_worker(settings, registry) as worker, asyncio.timeout(60):
            await test(worker)

    asyncio.run(body())


async def at(worker: Worker, job: Job, step: int) -> None:
    await worker.store.change(job.tenant, job.id, lambda found: progressed(found, 1, {"step": step}, "training", step))


def test_a_job_that_its_worker_ends_is_charged_for_the_steps_that_ran(
    settings: TrainerSettings, registry: Store
) -> None:
    async def test(worker: Worker) -> None:
        async with taken(worker) as job:
            assert charged(worker) == 20
            await at(worker, job, 3)
            await worker._end(job, lambda found: failed(found, 1, Failure("disk_full", "no room")))
            assert charged(worker) == 6
            assert await worker.queue.unsettled() == []

    run(settings, registry, test)


def test_a_job_whose_worker_died_as_it_ended_is_settled_by_the_next_look(
    settings: TrainerSettings, registry: Store
) -> None:
    async def test(worker: Worker) -> None:
        async with taken(worker) as job:
            await at(worker, job, 4)
            await worker.store.change(job.tenant, job.id, lambda found: failed(found, 1, Failure("crashed", "gone")))
            assert charged(worker) == 20
            for _ in range(2):
                await worker.reconcile()
            assert charged(worker) == 8

    run(settings, registry, test)


def test_a_job_that_is_still_open_stays_charged_when_its_worker_is_lost(
    settings: TrainerSettings, registry: Store
) -> None:
    async def test(worker: Worker) -> None:
        async with taken(worker) as job:
            await at(worker, job, 4)
            await worker.store.change(job.tenant, job.id, lambda found: lost(found, 1))
            await worker.reconcile()
            assert charged(worker) == 20

    run(settings, registry, test)


@pytest.mark.parametrize("end", ["cancelled", "deleted"])
def test_the_delivery_of_a_job_that_ended_while_it_waited_costs_nothing(
    settings: TrainerSettings, registry: Store, end: str
) -> None:
    async def test(worker: Worker) -> None:
        job = await worker.store.create(new_job("acme", "me", CONFIG, None, 10))
        await worker.queue.put(job)
        await worker.store.change("acme", job.id, cancelled)
        if end == "deleted":
            await worker.store.delete("acme", job.id)
        handled = asyncio.Event()

        async def handle(tenant: str, job_id: str, token: int) -> None:
            assert charged(worker) == 20
            await worker.handle(tenant, job_id, token)
            handled.set()

        async with working(worker, handle, 1):
            await handled.wait()
        assert charged(worker) == 0

    run(settings, registry, test)


def test_after_a_restart_tenants_take_turns_from_the_first_job_on(settings: TrainerSettings, registry: Store) -> None:
    """The jobs were put one by one while workers took them: all places went to whoever had queued first."""

    async def test(worker: Worker) -> None:
        for tenant in ("flood", "flood", "flood", "small"):
            job = await worker.store.create(new_job(tenant, "me", CONFIG, None, 10))
            await worker.store.change(tenant, job.id, lambda found: claimed(found, 1, "gone"))
        started: list[str] = []

        async def take(tenant: str, job_id: str, token: int) -> None:
            started.append(tenant)

        async with working(worker, take, 2):
            await asyncio.sleep(0)
            await worker.reconcile()
            while len(started) < 4:
                await asyncio.sleep(0.01)
        assert set(started[:2]) == {"flood", "small"}

    run(settings, registry, test)


def test_the_last_step_is_known_though_scores_came_before_it_was_written(
    settings: TrainerSettings, registry: Store
) -> None:
    async def test(worker: Worker) -> None:
        async with taken(worker) as job:
            progress = ProgressWriter(job, worker.store, worker.metrics, 60)
            progress.receive({"event": "progress", "step": 9, "total": 9})
            progress.receive({"event": "progress", "evaluated": 1, "inputs": 5})
            await progress.flush()
            found = await worker.store.get(job.tenant, job.id)
            assert (found.steps, found.progress["evaluated"]) == (9, 1)

    run(settings, registry, test)


@pytest.mark.parametrize(("count", "given", "steps"), [(10, {"batch_size": 4, "epochs": 3}, 9), (3, {}, 5)])
def test_a_submitted_job_plans_the_steps_of_all_its_lines(
    settings: TrainerSettings, count: int, given: dict[str, int], steps: int
) -> None:
    async def test() -> None:
        trainer = await assemble(settings)
        transport = httpx.ASGITransport(create_public(trainer.runtime, Intake(60, 1 << 20)))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                dataset = (await client.post("/datasets", content=lines(count))).json()["dataset"]
                body = {"task": "e2e", "dataset": dataset, "hyperparameters": given}
                told = (await client.post("/jobs", json=body)).json()
            assert (await trainer.worker.store.get("default", told["id"])).planned_steps == steps
            assert not {"planned_steps", "steps"} & told.keys()
        finally:
            await trainer.close()

    asyncio.run(test())
