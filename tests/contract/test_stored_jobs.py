"""Jobs and datasets that an earlier commit's trainer left behind are read whole, taken over, finished and deleted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from prefixes.errors import TaskNotFound
from prefixes.limiter.memory import MemoryLimiter
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.registry.redis.url import parse_redis_url
from prefixes.tenancy.keyring import Keyring
from server.web.denials import DenialLog
from server.web.settings_sources import load_settings
from tests.support.datasets import LIMIT, line, upload
from tests.support.redis_registry import DATA
from tests.support.stored import Stored
from trainer.data.dataset import read_dataset
from trainer.data.store import DatasetNotFound, DatasetStore
from trainer.jobs.base import JobStore, Queue
from trainer.jobs.disk_store import DiskJobStore
from trainer.jobs.errors import Fenced, JobConflict, JobNotFound
from trainer.jobs.folders import JobFolders
from trainer.jobs.job import cancelled, claimed, progressed, retried, succeeded, trained
from trainer.jobs.local_queue import LocalQueue
from trainer.jobs.record import Job, job_from
from trainer.jobs.redis_store import PREFIX, RedisJobStore
from trainer.jobs.saq_queue import NAME, PATIENCE, SaqQueue
from trainer.service.metrics import JobMetrics
from trainer.service.settings import TrainerSettings
from trainer.service.settling import Settling
from trainer.service.steps import StepReservations
from trainer.service.usage import JobUsage
from trainer.service.worker import Worker

LEASE_S = 4
PATIENCE_S = 60.0
STATES = {
    "succeeded": "succeeded", "failed": "failed", "stopped": "cancelled", "retried": "queued", "running": "running",
    "cancelling": "running", "sealed": "running", "queued": "queued", "cancelled": "cancelled", "foreign": "queued",
}  # fmt: skip
"""What the jobs are called -> the states in which they were left."""


class Trainer:
    """Today's code over what was stored."""

    def __init__(self, stored: Stored) -> None:
        self.told = stored.read("trainer")
        self.root = stored.folder("trainer")
        self.redis = parse_redis_url(stored.url("trainer")) if stored.kind == "redis" else None

    def run(self, test: Callable[[JobStore], Awaitable[None]]) -> None:
        async def body() -> None:
            store: JobStore = RedisJobStore(self.redis.connect_asyncio()) if self.redis else DiskJobStore(self.root)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await test(store)
            finally:
                await store.close()

        asyncio.run(body())

    def queue(self) -> Queue:
        if self.redis is None:
            return LocalQueue(self.root / "turns.json", lambda tenant: 1.0)
        client = self.redis.connect_asyncio(patience=PATIENCE)
        return SaqQueue(client, "today", lambda tenant: 1.0, lease_s=LEASE_S)

    def id(self, name: str) -> str:
        job_id: str = self.told["names"][name]
        return job_id

    def left(self, state: str) -> set[str]:
        """Ids of the jobs that were left in that state."""
        return {self.id(name) for name, found in STATES.items() if found == state}


@pytest.fixture
def trainer(stored: Stored) -> Trainer:
    return Trainer(stored)


def test_jobs_and_their_events_are_read_as_they_were(trainer: Trainer) -> None:
    async def test(store: JobStore) -> None:
        found = {tenant: await store.jobs(tenant, limit=100) for tenant in ("acme", "default")}
        assert found == {tenant: [job_from(job) for job in jobs] for tenant, jobs in trainer.told["jobs"].items()}
        assert [job.id for job in await store.open_jobs()] == trainer.told["open"]
        states = {job.id: job.state for jobs in found.values() for job in jobs}
        assert states == {trainer.id(name): state for name, state in STATES.items()}
        assert await store.jobs("acme", limit=2, before=found["acme"][1].id) == found["acme"][2:4]
        for tenant, jobs in found.items():
            for job in jobs:
                assert await store.get(tenant, job.id) == job
                events = await store.events(tenant, job.id)
                assert [asdict(event) for event in events] == trainer.told["events"][job.id]
                assert await store.events(tenant, job.id, events[0].id) == events[1:]
        assert {event["name"] for event in trainer.told["events"][trainer.id("running")]} == {"state", "progress"}

    trainer.run(test)


def test_jobs_whose_worker_is_gone_are_taken_over_and_finished_and_those_that_waited_too(
    trainer: Trainer, stored: Stored
) -> None:
    async def test(store: JobStore, registry: Store) -> None:
        queue, folders = trainer.queue(), JobFolders(trainer.root)
        settings = load_settings(
            TrainerSettings, {"data": trainer.root, "registry": "unused", "backbone": ["tiny=/unused"]}, config=None
        )
        keyring, metrics = Keyring(registry.tenancy, 60), JobMetrics(CollectorRegistry())
        settling = Settling(store, queue, StepReservations(MemoryLimiter(), keyring), JobUsage(registry.usage))
        denials = DenialLog(registry.tenancy)
        worker = Worker("today", settings, store, queue, folders, registry, keyring, metrics, settling, denials)
        lost = {job.id for job in await queue.dead(await store.open_jobs()) if trainer.redis or job.state == "running"}
        assert lost == trainer.left("running")
        assert [job.id for job in await worker.reconcile()] == trainer.told["open"]
        ended = await store.get("acme", trainer.id("cancelling"))
        assert ended.state == "cancelled"
        with pytest.raises(Fenced):  # the one who was gone wakes up
            await store.change("acme", trainer.id("running"), lambda job: progressed(job, 1, {"step": 40}, "training"))

        taken: dict[str, int] = {}

        async def take(tenant: str, job_id: str, token: int) -> None:
            taken[job_id] = token
            job = await store.change(tenant, job_id, lambda job: claimed(job, token, "today"))
            folder = folders.enter(job)
            if token > 1:
                assert (folder / "notes.txt").read_text() == "by delivery 1\n"
            await finish(store, registry, job)

        work = asyncio.create_task(queue.work(take, 2))
        waiting = {"running": 2, "sealed": 2, "retried": 2, "queued": 2, "foreign": 1}
        while await store.open_jobs():
            await asyncio.sleep(0.05)
        assert taken == {trainer.id(name): token for name, token in waiting.items()}
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        await queue.close()

        for name in waiting:
            tenant = "default" if name == "foreign" else "acme"
            job = await store.get(tenant, trainer.id(name))
            assert (job.state, job.worker) == ("succeeded", "today")
            events = await store.events(tenant, job.id)
            before = trainer.told["events"][job.id]
            assert [asdict(event) for event in events[: len(before)]] == before
            assert events[-1].data["state"] == "succeeded"

    with closing(open_registry(stored.url("registry"), create=False)) as registry:
        trainer.run(lambda store: test(store, registry))


async def finish(store: JobStore, registry: Store, job: Job) -> None:
    """Publish once and succeed. Of the trained job this was done, but for saying so."""
    tasks = registry.tasks()
    if job.version is None:
        with pytest.raises(TaskNotFound):
            registry.inspect("acme", job.id)
        result = registry.publish("acme", job.id, DATA[0], record={}, idempotency_key=job.id).version
        job = await store.change(job.tenant, job.id, lambda found: trained(found, job.token, result))
    else:
        result = registry.publish("acme", "e2e", DATA[0], record={}, idempotency_key=job.id).version
        assert result == job.version
        assert registry.tasks() == tasks
    await store.change(job.tenant, job.id, lambda found: succeeded(found, job.token, {"version": result}))


def test_owners_cancel_retry_and_delete_what_was_stored(trainer: Trainer, stored: Stored) -> None:
    async def test(store: JobStore) -> None:
        again = await store.change("acme", trainer.id("failed"), retried)
        assert (again.state, again.token, again.attempt, again.failure) == ("queued", 2, 2, None)
        assert [job.id for job in await store.open_jobs()] == [*trainer.told["open"], again.id]
        with pytest.raises(JobConflict):
            await store.delete("acme", trainer.id("running"))
        for name, state in STATES.items():
            tenant = "default" if name == "foreign" else "acme"
            job_id = trainer.id(name)
            if state == "running":
                job = await store.change(tenant, job_id, cancelled)
                assert job.to_be_cancelled == (name != "sealed")
            else:
                if state == "queued" or name == "failed":
                    await store.change(tenant, job_id, cancelled)
                deleted = await store.delete(tenant, job_id)
                assert deleted.ended
                with pytest.raises(JobNotFound):
                    await store.get(tenant, job_id)
                JobFolders(trainer.root).remove(deleted)
        assert {job.id for job in await store.jobs("acme", limit=100)} == trainer.left("running")
        assert {job.id for job in await store.open_jobs()} == trainer.left("running")

    trainer.run(test)
    left = trainer.left("running")
    assert {path.name for path in (trainer.root / "tenants" / "acme" / "jobs").iterdir()} == left
    if trainer.redis:
        with stored.client() as client:
            keys = {key.decode() for key in client.scan_iter(match=f"{PREFIX}*")}
            assert len(client.lrange(f"saq:{NAME}:active", 0, -1)) == 3
        lists = {f"{PREFIX}jobs:acme", f"{PREFIX}open", f"{PREFIX}open:acme"}
        assert keys == lists | {f"{PREFIX}{kind}:{job}" for job in left for kind in ("job:acme", "events")}
    else:
        assert {path.name for path in (trainer.root / "jobs").iterdir()} == left


def test_datasets_are_read_known_again_and_deleted(trainer: Trainer) -> None:
    store = DatasetStore(trainer.root)
    (info,) = store.list("acme")
    assert [asdict(info)] == [{**told, "key_id": None} for told in trainer.told["datasets"]]
    data = read_dataset(store.path("acme", info.digest))
    assert (data.digest, len(data.examples)) == (info.digest, info.lines)
    assert data.examples[0].target == "A coffee shop, é."
    folder = trainer.root / "tenants" / "acme" / "datasets"
    assert upload(store, store.path("acme", info.digest).read_bytes()) == info
    (cut_short,) = folder.glob(".upload-*")
    day_before = time.time() - 2 * 86400
    os.utime(cut_short, (day_before, day_before))
    store.begin("acme", max_bytes=LIMIT).abort()
    assert not cut_short.exists()
    assert upload(store, line(1)).digest in {found.digest for found in store.list("acme")}
    store.delete("acme", info.digest)
    with pytest.raises(DatasetNotFound):
        store.info("acme", info.digest)
    assert remaining(folder, info.digest) == []


def remaining(folder: Path, digest: str) -> list[Path]:
    return list(folder.glob(f"{digest.removeprefix('sha256:')}*"))
