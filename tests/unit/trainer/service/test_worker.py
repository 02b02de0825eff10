"""A worker's parts: what it hears of its process, what it tells the owner, and when it may not publish."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from prefixes.errors import BackboneError, QuotaExceeded, TaskNotFound
from prefixes.files import write_bytes, write_json
from prefixes.limiter.memory import MemoryLimiter
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.keyring import Keyring
from server.web.denials import DenialLog
from server.web.settings_sources import load_settings
from tests.support.server import TinyWorld, make_world
from trainer.data.store import DatasetStore
from trainer.jobs import disk_store
from trainer.jobs.disk_store import DiskJobStore
from trainer.jobs.errors import Fenced
from trainer.jobs.folders import JobFolders
from trainer.jobs.job import cancelled, claimed, failed, handed_back, lost, new_job, retried, stopped, trained
from trainer.jobs.local_queue import LocalQueue
from trainer.jobs.record import Failure, Job
from trainer.jobs.signals import Watch
from trainer.service.metrics import JobMetrics
from trainer.service.outcome import Cancelled, JobFailed, public, version_of
from trainer.service.process import ChildProcess
from trainer.service.request import ARTIFACT, RECORD, REQUEST, prepare
from trainer.service.settings import TrainerSettings
from trainer.service.settling import Settling
from trainer.service.steps import StepReservations
from trainer.service.usage import JobUsage
from trainer.service.worker import Worker

NAME = "machine-1"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def settings(tmp_path: Path) -> TrainerSettings:
    given = {
        "data": tmp_path / "data",
        "registry": str(tmp_path / "registry"),
        "backbone": ["tiny=/models/secret-place"],
    }
    return load_settings(TrainerSettings, given, config=None)


@pytest.fixture
def registry(settings: TrainerSettings) -> Iterator[Store]:
    with closing(open_registry(settings.registry)) as made:
        yield made


@asynccontextmanager
async def a_worker(settings: TrainerSettings, registry: Store) -> AsyncIterator[Worker]:
    store = DiskJobStore(settings.data)
    keyring, metrics = Keyring(registry.tenancy, 60), JobMetrics(CollectorRegistry())
    queue = LocalQueue(settings.data / "turns.json", keyring.weight_of)
    settling = Settling(store, queue, StepReservations(MemoryLimiter(), keyring), JobUsage(registry.usage))
    folders, denials = JobFolders(settings.data), DenialLog(registry.tenancy)
    yield Worker(NAME, settings, store, queue, folders, registry, keyring, metrics, settling, denials)
    await store.close()


async def finished_job(worker: Worker, artifact: bytes, key_id: str | None = None) -> tuple[Job, Path]:
    """A job whose training has ended and whose publish comes next, and its folder."""
    spec = {"task": "default/e2e", "alias": "production"}
    job = await worker.store.create(new_job("default", "me", spec, key_id))
    job = await worker.store.change("default", job.id, lambda found: claimed(found, 1, NAME))
    folder = worker.folders.enter(job)
    write_bytes(folder / ARTIFACT, artifact)
    write_json(folder / RECORD, {"scores": {}})
    return await worker.store.change("default", job.id, lambda found: trained(found, 1, "sha256:1")), folder


async def end(worker: Worker, job: Job) -> None:
    await worker.store.change("default", job.id, lambda found: lost(found, 1))
    await worker.store.change("default", job.id, lambda found: claimed(found, 2, "machine-2"))
    await worker.store.change("default", job.id, lambda found: failed(found, 2, Failure("disk_full", "no room")))


async def begin_again(worker: Worker, job: Job) -> None:
    await end(worker, job)
    await worker.store.change("default", job.id, retried)


async def give_to_another(worker: Worker, job: Job) -> None:
    """As a Redis does that forgets who has the job, and gives the same token away again."""

    def same_token(found: Job) -> Any:
        return claimed(handed_back(found, 1).job, 2, "machine-2")

    made = await worker.store.change("default", job.id, same_token)
    assert made.worker == "machine-2"


async def delete(worker: Worker, job: Job) -> None:
    await end(worker, job)
    await worker.store.delete("default", job.id)


@pytest.mark.parametrize("meanwhile", [end, begin_again, give_to_another, delete])
def test_a_worker_that_slept_before_its_publish_publishes_nothing(
    world: TinyWorld, settings: TrainerSettings, registry: Store, meanwhile: Callable[..., Any]
) -> None:
    async def test() -> None:
        async with a_worker(settings, registry) as worker:
            job, folder = await finished_job(worker, world.prefix())
            await meanwhile(worker, job)
            with worker.store.watch(job.id) as watch, pytest.raises(Fenced):
                await worker._publish(job, folder, watch)

    asyncio.run(test())
    with pytest.raises(TaskNotFound):
        registry.inspect("default", "e2e")


def test_a_job_publishes_no_more_than_its_tenant_may_have(
    settings: TrainerSettings, registry: Store, world: TinyWorld
) -> None:
    """Else whoever may not upload would train. The result is kept, and a retry publishes it once there is room."""

    async def test() -> None:
        directory = Directory(registry.tenancy)
        key = directory.create_key("default", "ci", ["train", "publish"], actor="test").key
        directory.limit_tenant("default", {"registry_tasks": 0}, actor="test")
        async with a_worker(settings, registry) as worker:
            job, folder = await finished_job(worker, world.prefix(), key.id)
            with worker.store.watch(job.id) as watch, pytest.raises(QuotaExceeded, match="registry_tasks"):
                await worker._publish(job, folder, watch)
            assert registry.tasks() == [] and (folder / ARTIFACT).exists()
            directory.limit_tenant("default", {"registry_tasks": 1}, actor="test")
            with worker.store.watch(job.id) as watch:
                await worker._publish(job, folder, watch)
        assert [task.name for task in registry.tasks()] == ["e2e"]

    asyncio.run(test())


@pytest.mark.parametrize("asked", ["while it was trained", "while it was published"])
def test_a_cancel_is_heard_until_the_prefix_is_trained_and_then_too_late(
    world: TinyWorld, settings: TrainerSettings, registry: Store, asked: str
) -> None:
    """One that came after the last training step was answered, and the prefix published all the same."""

    class Quick(Worker):
        async def _prepare(self, job: Job, folder: Path, watch: Watch) -> None:
            write_bytes(folder / ARTIFACT, world.prefix())
            write_json(folder / RECORD, {"scores": {}})

        async def _train(self, job: Job, folder: Path, watch: Watch) -> str:
            if asked == "while it was trained":
                await self.store.change("default", job.id, cancelled)
            return "sha256:1"

        async def _publish(self, job: Job, folder: Path, watch: Watch) -> dict[str, Any]:
            await self.store.change("default", job.id, cancelled)
            return await super()._publish(job, folder, watch)

    async def test() -> Job:
        async with a_worker(settings, registry) as made:
            worker = Quick(**vars(made))
            job = await worker.store.create(new_job("default", "me", {"task": "default/e2e", "alias": "production"}))
            await worker.handle("default", job.id, 1)
            return await worker.store.get("default", job.id)

    if asked == "while it was trained":
        assert asyncio.run(test()).state == "cancelled"
        with pytest.raises(TaskNotFound):
            registry.inspect("default", "e2e")
    else:
        assert asyncio.run(test()).state == "succeeded"
        assert registry.inspect("default", "e2e").aliases


def test_a_worker_that_sleeps_while_its_job_is_deleted_leaves_no_folder(
    settings: TrainerSettings, registry: Store
) -> None:
    class Slow(JobFolders):
        def enter(self, job: Job) -> Path:
            asyncio.run_coroutine_threadsafe(gone(job, here[1]), here[0]).result()
            return super().enter(job)

    async def gone(job: Job, worker: Worker) -> None:
        await worker.store.change("default", job.id, lambda found: stopped(found, 1))
        await worker.store.delete("default", job.id)

    async def test() -> None:
        async with a_worker(settings, registry) as made:
            worker = replace(made, folders=Slow(settings.data))
            here.extend([asyncio.get_running_loop(), worker])
            job = await worker.store.create(new_job("default", "me", {}))
            await worker.handle("default", job.id, 1)
            assert not worker.folders.of(job).exists()

    here: list[Any] = []
    asyncio.run(test())


def test_what_is_claimed_while_the_worker_ends_is_handed_back(
    settings: TrainerSettings, registry: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_disk = disk_store._to_disk

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.2)
        to_disk(*arguments, **options)

    async def test() -> None:
        async with a_worker(settings, registry) as worker:
            job = await worker.store.create(new_job("default", "me", {}))
            monkeypatch.setattr(disk_store, "_to_disk", slow)
            handling = asyncio.create_task(worker.handle("default", job.id, 1))
            await asyncio.sleep(0.1)  # in the middle of the claim, whose thread writes on
            handling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await handling
            found = await worker.store.get("default", job.id)
            assert (found.state, found.token, found.lost) == ("queued", 2, 0)
            assert await worker.queue.dead([found]) == []

    asyncio.run(test())


def test_a_start_waits_for_a_registry_that_is_away(
    world: TinyWorld, settings: TrainerSettings, registry: Store, tmp_path: Path
) -> None:
    version = registry.publish("default", "from", world.prefix(), record={}).version
    (settings.data / "tenants/default/datasets").mkdir(parents=True)
    away = tmp_path / "away"

    async def test() -> None:
        async with a_worker(settings, registry) as worker:
            spec = a_spec(settings, start_from=f"default/from@{version}")
            job = await worker.store.create(new_job("default", "me", spec))
            job = await worker.store.change("default", job.id, lambda found: claimed(found, 1, NAME))
            folder = worker.folders.enter(job)
            (tmp_path / "registry").rename(away)
            with worker.store.watch(job.id) as watch:
                preparing = asyncio.create_task(worker._prepare(job, folder, watch))
                await asyncio.sleep(0.3)
                assert not preparing.done()
                away.rename(tmp_path / "registry")
                await preparing
            assert (folder / REQUEST).exists()

    asyncio.run(test())


def test_a_worker_without_the_backbone_says_which_it_has(settings: TrainerSettings, registry: Store) -> None:
    job = new_job("default", "me", {"backbone": "large"}).job
    with pytest.raises(BackboneError, match=r"'large'.*tiny"):
        prepare(job, settings.data, settings, registry)


def test_a_job_gets_the_trainers_word_on_generation_configs(settings: TrainerSettings, registry: Store) -> None:
    told = settings.model_copy(update={"ignore_generation_config": ("min_p", "sequence_bias")})
    job = new_job("default", "me", a_spec(settings, start_from=None)).job
    prepare(job, settings.data, told, registry)
    run = json.loads((settings.data / REQUEST).read_text())["run"]
    assert run["ignore_generation_config"] == ["min_p", "sequence_bias"]


@pytest.mark.parametrize(("place", "whole"), [("models/tiny.gguf", True), ("smollm2", False)])
def test_a_backbones_file_is_found_from_the_jobs_folder_too(
    settings: TrainerSettings, registry: Store, place: str, whole: bool
) -> None:
    told = settings.model_copy(update={"backbone": (f"tiny={place}",)})
    prepare(new_job("default", "me", a_spec(settings, start_from=None)).job, settings.data, told, registry)
    run = json.loads((settings.data / REQUEST).read_text())["run"]
    assert run["backbone"] == (str(Path(place).absolute()) if whole else place)


def test_a_loss_that_is_not_finite_is_none_to_whoever_hears_of_it() -> None:
    async def heard() -> list[Mapping[str, Any]]:
        text = 'print(\'{"event": "progress", "loss": NaN, "validation_loss": -Infinity, "step": 3}\\nno JSON\\n[1]\')'
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", text, stdout=asyncio.subprocess.PIPE)
        child = ChildProcess(process)
        messages = [message async for message in child.messages()]
        assert await child.wait() == 0
        return messages

    assert asyncio.run(heard()) == [{"event": "progress", "loss": None, "validation_loss": None, "step": 3}]


def test_the_last_word_of_a_process_counts_and_not_how_it_exits_afterwards(settings: TrainerSettings) -> None:
    for code in (0, 1, -9, -11):
        assert version_of({"event": "done", "version": "sha256:1"}, code, settings) == "sha256:1"
        with pytest.raises(Cancelled):
            version_of({"event": "failed", "code": "cancelled", "message": ""}, code, settings)
        with pytest.raises(JobFailed) as caught:
            version_of({"event": "failed", "code": "disk_full", "message": "no room"}, code, settings)
        assert caught.value.failure.code == "disk_full"
    for code, expected in ((-9, "out_of_memory"), (-11, "crashed"), (3, "crashed")):
        with pytest.raises(JobFailed) as caught:
            version_of({}, code, settings)
        assert caught.value.failure.code == expected


def test_a_failure_names_no_place_of_the_machine(settings: TrainerSettings) -> None:
    said = f"{settings.data}/tenants/acme/x: damaged; backbone '/models/secret-place': no weights; " + "x" * 10_000
    message = public(said, settings)
    assert message.startswith("<data>/tenants/acme/x: damaged; backbone '<tiny>': no weights")
    assert len(message) < 3000
    said = f"expected JSON at '/opt/cache/hub/models--a--b/config.json' or {Path.home()}/x, not 3/4 of </s>"
    assert public(said, settings) == "expected JSON at '<path>' or <home>/x, not 3/4 of </s>"
    assert public("file:///opt/x/y and /a/b:/c/d", settings) == "file://<path> and <path>:<path>"
    assert public("see https://example.org/a/b and {input}/{input}", settings).endswith("org/a/b and {input}/{input}")


def a_spec(settings: TrainerSettings, **fields: Any) -> dict[str, Any]:
    """Of a job whose data lies in ``settings.data``."""
    with DatasetStore(settings.data).begin("default", max_bytes=1000) as upload:
        upload.write(b'{"input": "a", "target": "b"}\n')
        dataset = upload.finish().digest
    asked = ("config", "template", "hold_out", "defaults", "drop_long", "truncate")
    spec = {"task": "default/e2e", "dataset": dataset, "validation_dataset": None, "backbone": "tiny"}
    return {**spec, "evaluation": None, **dict.fromkeys(asked), **fields}
