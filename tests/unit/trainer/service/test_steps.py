"""``training_steps_per_day``: reserved with the job, settled once with the steps that ran, whoever ends the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from prefixes.limiter.base import Charge, Window
from prefixes.tenancy.limits import NO_LIMITS, Limits
from tests.unit.trainer.service.test_quotas import Served, refusal, served
from trainer.jobs.job import claimed, failed, lost, progressed, stopped, succeeded, trained
from trainer.jobs.record import Failure, Job
from trainer.service.steps import COUNTER

STEPS: Final[dict[str, Any]] = {"hyperparameters": {"batch_size": 1, "epochs": 10}}
"""Three lines: 30 steps at most."""


def used(trainer: Served, key: str | None = None) -> int:
    """What acme has used or reserved today, or one of its keys."""
    probe = Charge(COUNTER, Window.DAY, 10**9, 0, None if key is None else trainer.keys[key][0])
    limiter = trainer.trainer.worker.settling.steps.limiter
    answer = limiter.take("acme", "probe", [probe], 60)
    limiter.settle("acme", "probe", {})
    return answer.states[0].used


async def begin(trainer: Served, job_id: str, step: int, attempt: int = 1) -> Job:
    """A worker has the job, and has reached ``step``."""
    store, name = trainer.trainer.worker.store, trainer.trainer.worker.name
    job = await store.change("acme", job_id, lambda found: claimed(found, found.token, name))
    assert job.attempt == attempt
    return await store.change(
        "acme", job_id, lambda found: progressed(found, found.token, {"step": step}, "training", step)
    )


async def fail(trainer: Served, job: Job) -> None:
    await trainer.trainer.worker._end(job, lambda found: failed(found, found.token, Failure("disk_full", "no room")))


def test_a_search_reserves_what_its_budget_can_take_at_most(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(training_steps_per_day=2000))
        assert (await trainer.submit(auto=True, budget_minutes=3)).status_code == 201
        assert used(trainer) == 1800
        status, code, _ = refusal(await trainer.submit("two", auto=True, budget_minutes=0.5))
        assert (status, code) == (403, "quota_exceeded")
        for fields, said in (
            ({"budget_minutes": 3}, "expected auto beside it"),
            ({"auto": True, "hold_out": 0}, "expected held-out inputs"),
            ({"auto": True, "hyperparameters": {"epochs": 3}}, "expected none beside auto"),
            ({"hyperparameters": {"patience": 3}, "hold_out": 0}, "patience: expected held-out inputs"),
        ):
            answer = await trainer.submit("two", **fields)
            assert answer.status_code == 422 and said in answer.text, answer.text

    served(tmp_path, test)


def test_planned_steps_are_reserved_and_what_is_too_much_is_refused(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(training_steps_per_day=70))
        for _ in range(2):
            assert (await trainer.submit(**STEPS)).status_code == 201
        assert used(trainer) == 60
        status, code, detail = refusal(await trainer.submit("two", **STEPS))
        assert (status, code) == (403, "quota_exceeded")
        assert isinstance(detail, dict) and 0 < detail.pop("resets_in_s") <= 86_400
        assert detail == {"limit": "training_steps_per_day", "of": "tenant", "expected": 70, "got": 90}
        assert used(trainer) == 60
        assert (await trainer.submit("foreign", **STEPS)).status_code == 201
        assert (await trainer.submit(hyperparameters={"batch_size": 3, "epochs": 10})).status_code == 201

    served(tmp_path, test)


def test_a_job_above_the_whole_limit_is_422_and_no_wait_is_offered(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(one=Limits(training_steps_per_day=29))
        status, code, detail = refusal(await trainer.submit(**STEPS))
        assert (status, code) == (422, "invalid_parameter")
        assert isinstance(detail, dict) and detail["parameter"] == "hyperparameters"
        assert (detail["of"], detail["expected"], detail["got"]) == ("key", 29, 30)
        assert (await trainer.submit("two", **STEPS)).status_code == 201

    served(tmp_path, test)


def test_a_keys_steps_are_its_own_and_its_tenants(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(training_steps_per_day=1000), one=Limits(training_steps_per_day=40))
        assert (await trainer.submit("one", **STEPS)).status_code == 201
        assert refusal(await trainer.submit("one", **STEPS))[2]["of"] == "key"  # type: ignore[index]
        assert (await trainer.submit("two", **STEPS)).status_code == 201
        assert (used(trainer), used(trainer, "one")) == (60, 30)

    served(tmp_path, test)


def test_a_job_that_is_refused_for_another_reason_reserves_nothing(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(training_steps_per_day=100, open_jobs=1))
        assert (await trainer.submit(**STEPS)).status_code == 201
        assert refusal(await trainer.submit(**STEPS))[2]["limit"] == "open_jobs"  # type: ignore[index]
        assert used(trainer) == 30

    served(tmp_path, test)


def test_a_job_that_is_cancelled_while_it_waits_costs_nothing(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(training_steps_per_day=30))
        job = (await trainer.submit(**STEPS)).json()["id"]
        assert (await trainer.post(f"/jobs/{job}/cancel")).status_code == 200
        assert used(trainer) == 0
        assert (await trainer.submit(**STEPS)).status_code == 201

    served(tmp_path, test)


@pytest.mark.parametrize(
    "end",
    [
        lambda found: failed(found, found.token, Failure("crashed", "gone")),
        lambda found: stopped(found, found.token),
        lambda found: succeeded(trained(found, found.token, "sha256:1").job, found.token, {}),
    ],
    ids=["failed", "cancelled", "succeeded"],
)
def test_an_ended_job_costs_the_steps_that_ran_and_that_is_settled_once(
    tmp_path: Path, end: Callable[[Job], object]
) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(training_steps_per_day=100))
        job = await begin(trainer, (await trainer.submit(**STEPS)).json()["id"], 7)
        assert used(trainer) == 30
        await trainer.trainer.worker._end(job, end)  # type: ignore[arg-type]
        assert used(trainer) == 7
        for _ in range(2):
            await trainer.trainer.worker.settling.settle("acme", job.id)
            await trainer.trainer.worker.reconcile()
        assert used(trainer) == 7

    served(tmp_path, test)


def test_a_job_whose_last_worker_is_lost_is_settled_by_who_finds_it(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(training_steps_per_day=100))
        job_id = (await trainer.submit(**STEPS)).json()["id"]
        worker = trainer.trainer.worker
        job = await begin(trainer, job_id, 5)
        turns = worker.queue._turns.next([one for one, _ in worker.queue._waiting], worker.keyring.weight_of)[1]  # type: ignore[attr-defined]
        worker.queue._turns = turns  # type: ignore[attr-defined]  # a worker took it
        for _ in range(2):
            job = await worker.store.change("acme", job_id, lambda found: lost(found, found.token))
            job = await begin(trainer, job_id, 12)
        job = await worker.store.change("acme", job_id, lambda found: lost(found, found.token))
        assert (job.state, used(trainer)) == ("failed", 30)
        await worker.reconcile()
        assert used(trainer) == 12  # each step once, however often it was computed

    served(tmp_path, test)


def test_a_retry_reserves_anew_what_is_left(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(training_steps_per_day=40))
        job = await begin(trainer, (await trainer.submit(**STEPS)).json()["id"], 10)
        await fail(trainer, job)
        assert used(trainer) == 10
        assert (await trainer.post(f"/jobs/{job.id}/retry")).status_code == 200
        assert used(trainer) == 30
        assert refusal(await trainer.post(f"/jobs/{job.id}/retry"))[1] == "conflict"
        assert used(trainer) == 30
        await fail(trainer, await begin(trainer, job.id, 16, attempt=2))
        assert used(trainer) == 16
        assert (await trainer.submit(hyperparameters={"batch_size": 1, "epochs": 8})).status_code == 201
        assert refusal(await trainer.post(f"/jobs/{job.id}/retry"))[:2] == (403, "quota_exceeded")
        assert used(trainer) == 40

    served(tmp_path, test)


def test_without_a_limit_nothing_is_reserved(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(NO_LIMITS)
        answer: httpx.Response = await trainer.submit(**STEPS)
        job = await trainer.trainer.worker.store.get("acme", answer.json()["id"])
        assert job.reservation is None
        assert not {"reservation", "steps_before"} & answer.json().keys()

    served(tmp_path, test)
