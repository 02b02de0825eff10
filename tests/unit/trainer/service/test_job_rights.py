"""A worker judges a job's rights when they count: before it trains or reads another's version, and before it publishes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from prefixes.errors import PrefixdError, RegistryUnavailable, TaskNotFound
from prefixes.files import write_bytes, write_json
from prefixes.registry.base import Store
from prefixes.tenancy.directory import Directory, later, utc_now
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.model import Share
from server.web.errors import Forbidden
from tests.support.server import TinyWorld
from tests.unit.trainer.service.test_worker import a_spec, a_worker, registry, settings, world
from trainer.jobs.job import claimed, new_job, retried
from trainer.jobs.record import Failure, Job
from trainer.jobs.signals import Watch
from trainer.service.outcome import JobFailed
from trainer.service.registry_retry import RegistryRetry
from trainer.service.request import ARTIFACT, RECORD, START
from trainer.service.settings import TrainerSettings
from trainer.service.worker import Worker

__all__ = ["registry", "settings", "world"]

SPEC: Mapping[str, Any] = {"task": "acme/e2e", "alias": "production"}


class Quick(Worker):
    """Its jobs are trained as soon as they begin, into ``made``."""

    made = b""

    async def _prepare(self, job: Job, folder: Path, watch: Watch) -> None:
        write_bytes(folder / ARTIFACT, self.made)
        write_json(folder / RECORD, {"scores": {}})

    async def _train(self, job: Job, folder: Path, watch: Watch) -> str:
        return "sha256:1"


@pytest.mark.parametrize("spoil", ["revoked", "expired", "without the scope", "blocked"])
def test_a_job_whose_key_may_publish_no_more_fails_by_name_and_a_retry_publishes_what_was_kept(
    world: TinyWorld, settings: TrainerSettings, registry: Store, spoil: str
) -> None:
    directory = Directory(registry.tenancy)
    other = directory.create_key("acme", "other", ["train", "publish"], actor="t").key
    scopes = ["train"] if spoil == "without the scope" else ["train", "publish"]
    expires_at = later(utc_now(), 0.5) if spoil == "expired" else None
    key = directory.create_key("acme", "ci", scopes, expires_at=expires_at, actor="t").key

    class Trained(Quick):
        made = world.prefix()

        async def _train(self, job: Job, folder: Path, watch: Watch) -> str:
            if spoil == "revoked":
                directory.revoke(key.id, actor="t")
            while spoil == "expired" and key.works(utc_now()):
                await asyncio.sleep(0.01)
            if spoil == "blocked" and job.attempt == 1:
                directory.block("acme", True, actor="t")
            return await super()._train(job, folder, watch)

    async def test() -> None:
        async with a_worker(settings, registry) as made:
            worker = Trained(**vars(made))
            job = await worker.store.create(new_job("acme", "me", SPEC, key.id))
            await worker.handle("acme", job.id, 1)
            found = await worker.store.get("acme", job.id)
            assert found.state == "failed" and found.failure is not None
            assert found.failure.code == "forbidden"
            assert {"blocked": "blocked", "without the scope": "scope publish"}.get(spoil, "no more") in (
                found.failure.message
            )
            folder = worker.folders.result(found)
            assert folder is not None and (folder / ARTIFACT).read_bytes() == Trained.made
            with pytest.raises(TaskNotFound):
                registry.inspect("acme", "e2e")

            directory.block("acme", False, actor="t")
            again = await worker.store.change("acme", job.id, lambda found: retried(found, "other", other.id))
            await worker.handle("acme", job.id, again.token)
            assert (await worker.store.get("acme", job.id)).state == "succeeded"
            assert registry.inspect("acme", "e2e").aliases["production"]

    asyncio.run(test())


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_jobs_refused_publish_is_told_in_its_tenants_audit_once_an_attempt(
    world: TinyWorld, settings: TrainerSettings, registry: Store, attempts: int
) -> None:
    """It was the job's failure alone. While the registry is away the publish is tried again, and no denial is noted."""
    directory = Directory(registry.tenancy)
    key = directory.create_key("acme", "ci", ["train", "publish"], actor="t").key

    class Away(Keyring):
        left = 3

        def look(self) -> None:
            if self.left:
                self.left -= 1
                raise RegistryUnavailable("away")
            super().look()

    class Revoked(Quick):
        made = world.prefix()

        async def _train(self, job: Job, folder: Path, watch: Watch) -> str:
            directory.revoke(key.id, actor="t")
            return await super()._train(job, folder, watch)

        def _registry_retry(self, job: Job, watch: Watch) -> RegistryRetry:
            return Mock(wait=AsyncMock())

    async def test() -> str:
        async with a_worker(settings, registry) as made:
            worker = Revoked(**vars(made) | {"keyring": Away(registry.tenancy, 60)})
            by = [f"tenant:acme/key:{key.id}/request:r-{number}" for number in range(1, attempts + 1)]
            job = await worker.store.create(new_job("acme", by[0], SPEC, key.id))
            await worker.handle("acme", job.id, job.token)
            for actor in by[1:]:
                job = await worker.store.change("acme", job.id, partial(retried, actor=actor, key_id=key.id))
                await worker.handle("acme", job.id, job.token)
            assert worker.keyring.left == 0  # type: ignore[attr-defined]
            worker.denials.write()
            return job.id

    job_id = asyncio.run(test())
    told = sorted(registry.tenancy.denials("acme"), key=lambda denial: denial.request_id)
    assert [(d.key, d.action, d.route, d.what, d.request_id, d.count) for d in told] == [
        (key.id, "publish", f"job {job_id}", "acme/e2e", f"r-{number}", 1) for number in range(1, attempts + 1)
    ]
    assert all("works no more" in denial.reason for denial in told)
    assert registry.tenancy.denials(None) == []


@pytest.mark.parametrize("spoil", ["scope", "task", "start"])
def test_an_audited_refusal_of_a_job_names_only_tasks_that_it_may_know_of(
    world: TinyWorld, settings: TrainerSettings, registry: Store, spoil: str
) -> None:
    directory = Directory(registry.tenancy)
    directory.create_tenant("globex", actor="t")
    key = directory.create_key("default", "ci", ["train"] if spoil == "scope" else ["train", "publish"], actor="t").key
    asked = a_spec(settings, start_from=f"globex/secret@sha256:{'0' * 64}" if spoil == "start" else None)
    spec = {**asked, "task": "globex/secret" if spoil == "task" else "default/e2e"}

    async def test() -> None:
        async with a_worker(settings, registry) as worker:
            job = await worker.store.create(new_job("default", "me", spec, key.id))
            await worker.handle("default", job.id, 1)
            worker.denials.write()

    asyncio.run(test())
    [told] = registry.tenancy.denials("default")
    action, what = ("download", "") if spoil == "start" else ("publish", "default/e2e" if spoil == "scope" else "")
    assert (told.action, told.what) == (action, what)
    assert ("secret" in str(told)) is False


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda directory, key: directory.revoke(key.id, actor="t"), "works no more"),
        (lambda directory, key: directory.block("default", True, actor="t"), "blocked"),
        (None, "trains"),
        ("away", "trains"),
    ],
    ids=["revoked", "blocked", "works", "nobody knows"],
)
def test_a_job_that_may_publish_no_more_is_not_trained_when_its_turn_comes(
    settings: TrainerSettings, registry: Store, tmp_path: Path, spoil: Any, told: str
) -> None:
    """It trained for hours, and failed then. While nobody knows, training goes on: it is judged before it publishes."""
    directory = Directory(registry.tenancy)
    key = directory.create_key("default", "ci", ["train", "publish"], actor="t").key
    (settings.data / "tenants/default/datasets").mkdir(parents=True)

    class Trains(Worker):
        async def _train(self, job: Job, folder: Path, watch: Watch) -> str:
            raise JobFailed(Failure("trained", "it trains"))

    async def test() -> Failure | None:
        async with a_worker(settings, registry) as made:
            worker = Trains(**vars(made))
            job = await worker.store.create(new_job("default", "me", a_spec(settings, start_from=None), key.id))
            if spoil == "away":
                worker = replace(worker, keyring=Keyring(registry.tenancy, 0))
                (tmp_path / "registry").rename(tmp_path / "away")
            elif spoil is not None:
                spoil(directory, key)
            await worker.handle("default", job.id, 1)
            return (await worker.store.get("default", job.id)).failure

    failure = asyncio.run(test())
    assert failure is not None and told in failure.message
    assert failure.code == ("trained" if told == "trains" else "forbidden")


def test_a_job_publishes_with_a_key_that_was_rotated_meanwhile(
    world: TinyWorld, settings: TrainerSettings, registry: Store
) -> None:
    directory = Directory(registry.tenancy)
    key = directory.create_key("acme", "ci", ["train", "publish"], actor="t").key

    class Rotated(Quick):
        made = world.prefix()

        async def _train(self, job: Job, folder: Path, watch: Watch) -> str:
            directory.rotate(key.id, grace_s=0, actor="t")
            return await super()._train(job, folder, watch)

    async def test() -> None:
        async with a_worker(settings, registry) as made:
            worker = Rotated(**vars(made))
            job = await worker.store.create(new_job("acme", "me", SPEC, key.id))
            await worker.handle("acme", job.id, 1)
            assert (await worker.store.get("acme", job.id)).state == "succeeded"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("then", "error"),
    [
        (Share(tenants=frozenset({"default"}), download=True), None),
        (Share(tenants=frozenset({"default"})), Forbidden),
        (Share(tenants=frozenset({"initech"}), download=True), TaskNotFound),
        (Share(), TaskNotFound),
    ],
    ids=["shared", "without downloads", "with others", "no more"],
)
def test_a_version_that_is_shared_no_more_is_read_by_no_job_that_waited_meanwhile(
    world: TinyWorld, settings: TrainerSettings, registry: Store, then: Share, error: type[PrefixdError] | None
) -> None:
    """Who might start from it was asked when the job was submitted, and its worker read it days later."""
    directory = Directory(registry.tenancy)
    key = directory.create_key("default", "ci", ["train", "publish", "read"], actor="t").key
    directory.create_tenant("globex", actor="t")
    directory.create_tenant("initech", actor="t")
    version = registry.publish("globex", "from", world.prefix(), record={}).version
    directory.share("globex/from", Share(everyone=True, download=True), actor="t")

    async def test() -> None:
        async with a_worker(settings, registry) as worker:
            spec = a_spec(settings, start_from=f"globex/from@{version}")
            job = await worker.store.create(new_job("default", "me", spec, key.id))
            job = await worker.store.change("default", job.id, lambda found: claimed(found, 1, worker.name))
            folder = worker.folders.enter(job)
            directory.share("globex/from", then, actor="t")
            with worker.store.watch(job.id) as watch:
                if error is None:
                    await worker._prepare(job, folder, watch)
                else:
                    with pytest.raises(error):
                        await worker._prepare(job, folder, watch)
            assert (folder / START).exists() == (error is None)

    asyncio.run(test())
