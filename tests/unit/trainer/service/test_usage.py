"""What a job took is recorded once for each attempt, whoever ends it, and before the job can be forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.limiter.memory import MemoryLimiter
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.tenancy.keyring import Keyring
from prefixes.usage.model import Batch, Counts, Kind, Outcome, Subject, day_of
from server.web.auth import Caller
from server.web.settings_sources import load_settings
from tests.support.usage import kept
from trainer.data.store import DatasetStore
from trainer.jobs.disk_store import DiskJobStore
from trainer.jobs.errors import JobNotFound
from trainer.jobs.folders import JobFolders
from trainer.jobs.job import (
    cancelled,
    claimed,
    failed,
    handed_back,
    lost,
    new_job,
    progressed,
    retried,
    succeeded,
    trained,
)
from trainer.jobs.local_queue import LocalQueue
from trainer.jobs.record import Change, Failure, Job
from trainer.service.job_service import JobService
from trainer.service.quotas import Quotas
from trainer.service.settings import TrainerSettings
from trainer.service.settling import Settling
from trainer.service.steps import StepReservations
from trainer.service.usage import JobUsage, batch_of

NO = Failure("disk_full", "no room")


class Away:
    """A registry's usage that can be away."""

    def __init__(self, store: Store) -> None:
        self._store, self.away, self.added = store.usage, False, list[bool]()

    def add(self, batch: Batch) -> bool:
        if self.away:
            raise RegistryUnavailable("away")
        self.added.append(self._store.add(batch))
        return self.added[-1]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Store]:
    with closing(open_registry(f"disk://{tmp_path}/registry")) as made:
        yield made


def job(*moves: Callable[[Job], Change]) -> Job:
    """A job of acme after these moves."""
    found = new_job("acme", "me", {"task": "e2e", "alias": None}, "AAAAAAAAAAAA").job
    for move in moves:
        found = move(found).job
    return found


def run(step: int, tokens: int, token: int = 1) -> list[Callable[[Job], Change]]:
    """A worker has the job up to a step."""
    return [
        lambda found: claimed(found, token, "w"),
        lambda found: progressed(found, token, {"step": step}, "training", step, tokens),
    ]


def counts(found: Job) -> Counts | None:
    """What is counted of a job's last attempt, but for the time."""
    batch = batch_of(found)
    if batch is None:
        return None
    [(_, one)] = batch.counts.items()
    return replace(one, training_ms=min(1, one.training_ms))


def test_an_attempt_has_the_steps_that_it_added() -> None:
    first = job(*run(30, 300), lambda found: failed(found, 1, NO))
    assert counts(first) == Counts(jobs=1, training_steps=30, training_tokens=300, training_ms=1)
    again = retried(first).job
    assert batch_of(again) is None, "it has not ended"
    for move in (*run(50, 500, 2), lambda found: trained(found, 2, "sha256:1"), lambda found: succeeded(found, 2, {})):
        again = move(again).job
    assert counts(again) == Counts(jobs=1, training_steps=20, training_tokens=200, training_ms=1)
    one, two = batch_of(first), batch_of(again)
    assert one is not None and two is not None and one.writer != two.writer and first.finished_at is not None
    assert one.day == day_of(first.finished_at)
    [subject] = two.counts
    assert subject == Subject(
        Kind.TRAINING, "acme", "AAAAAAAAAAAA", "acme/e2e", "sha256:1", Outcome.FINISHED
    )  # fmt: skip


def test_steps_that_are_made_again_after_a_loss_count_once() -> None:
    found = job(*run(30, 300), lambda found: lost(found, 1), *run(20, 200, 2), lambda found: failed(found, 2, NO))
    assert counts(found) == Counts(jobs=1, training_steps=30, training_tokens=300, training_ms=1)


def test_a_job_that_is_cancelled_while_it_waits_took_what_was_before() -> None:
    assert batch_of(job(cancelled)) is None
    found = job(*run(3, 30), lambda found: handed_back(found, 1))
    waiting = replace(found, ran_s=7.25, claimed_at="2026-01-01T00:00:00.000Z")
    ended = cancelled(waiting).job
    batch = batch_of(ended)
    assert batch is not None
    assert list(batch.counts.values()) == [Counts(0, 0, 0, 0, 1, 3, 30, 7250)]
    assert {subject.outcome for subject in batch.counts} == {Outcome.ABORTED}


def test_scores_do_not_hide_the_last_step() -> None:
    """The progress that is told while outputs are scored has no step."""
    found = job(*run(30, 300), lambda found: progressed(found, 1, {"evaluated": 1}, "evaluating"))
    assert counts(failed(found, 1, NO).job) == Counts(jobs=1, training_steps=30, training_tokens=300, training_ms=1)


def served(
    tmp_path: Path, registry: Store, test: Callable[[JobService, Away], Coroutine[Any, Any, None]]
) -> None:
    """Run ``test`` with the service and the registry's usage."""
    given = {"data": tmp_path / "data", "registry": "unused", "backbone": ["tiny=/unused"]}
    settings = load_settings(TrainerSettings, given, config=None)

    async def scenario() -> None:
        store, keyring, away = DiskJobStore(settings.data), Keyring(registry.tenancy, 60), Away(registry)
        queue = LocalQueue(settings.data / "turns.json", keyring.weight_of)
        usage = JobUsage(away)  # type: ignore[arg-type]
        settling = Settling(store, queue, StepReservations(MemoryLimiter(), keyring), usage)
        service = JobService(
            settings, store, queue, JobFolders(settings.data), DatasetStore(settings.data), registry,
            Quotas(settings, keyring), settling,
        )  # fmt: skip
        await test(service, away)
        await store.close()

    asyncio.run(scenario())


async def ended(service: JobService) -> Job:
    """A job that has failed, and was not settled."""
    made = await service.store.create(new_job("acme", "me", {"task": "acme/e2e"}))
    for move in (*run(5, 50), lambda found: failed(found, 1, NO)):
        made = await service.store.change("acme", made.id, move)
    return made


def test_what_cannot_be_recorded_yet_is_recorded_once_it_can(tmp_path: Path, registry: Store) -> None:
    async def test(service: JobService, usage: Away) -> None:
        made = await ended(service)
        usage.away = True
        await service.settling.settle("acme", made.id)
        assert kept(registry.usage) == {}
        usage.away = False
        for _ in range(3):
            await service.settling.settle("acme", made.id)
        assert usage.added == [True, False, False]
        [one] = kept(registry.usage).values()
        assert (one.jobs, one.training_steps, one.training_tokens) == (1, 5, 50)

    served(tmp_path, registry, test)


def test_a_job_is_not_forgotten_or_begun_again_before_it_is_recorded(tmp_path: Path, registry: Store) -> None:
    async def test(service: JobService, usage: Away) -> None:
        made, caller = await ended(service), Caller("acme")
        usage.away = True
        for action in (service.delete, service.retry):
            with pytest.raises(RegistryUnavailable):
                await action(caller, made.id)
        assert await service.store.get("acme", made.id) == made
        usage.away = False
        again = await service.retry(caller, made.id)
        for move in (*run(9, 90, 2), lambda found: failed(found, 2, NO)):
            await service.store.change("acme", again.id, move)
        await service.delete(caller, made.id)
        with pytest.raises(JobNotFound):
            await service.store.get("acme", made.id)
        assert usage.added == [True, True]
        [one] = kept(registry.usage).values()
        assert (one.jobs, one.training_steps, one.training_tokens) == (2, 9, 90)

    served(tmp_path, registry, test)
