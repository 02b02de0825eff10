"""Two trainers on one Redis count one tenant's jobs and steps together, and either settles what the other reserved."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import httpx

from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import Limits
from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.callers import bearer
from tests.support.datasets import lines
from tests.support.limits import set_limits
from tests.support.redis_server import RedisServer
from trainer.jobs.job import claimed, failed, progressed
from trainer.jobs.record import Failure
from trainer.service.app import create_public
from trainer.service.assembly import AssembledTrainer, assemble
from trainer.service.settings import TrainerSettings


def test_steps_are_reserved_at_one_trainer_and_settled_at_another(tmp_path: Path) -> None:
    async def test(one: AssembledTrainer, two: AssembledTrainer) -> None:
        tenancy = one.worker.registry.tenancy  # type: ignore[attr-defined]
        made = Directory(tenancy).create_key("acme", "ci", ["train", "publish"], actor="t")
        set_limits(tenancy, tenants={"acme": Limits(training_steps_per_day=50, open_jobs=2)})
        clients = []
        for trainer in (one, two):
            trainer.runtime.keyring.look()
            transport = httpx.ASGITransport(create_public(trainer.runtime, Intake(60, 1 << 20)))
            clients.append(
                httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=bearer(made.secret))
            )
        dataset = (await clients[0].post("/datasets", content=lines(3))).json()["dataset"]
        steps = {"batch_size": 1, "epochs": 10}
        body = {"task": "e2e", "dataset": dataset, "evaluation": None, "hyperparameters": steps}
        job_id = (await clients[0].post("/jobs", json=body)).json()["id"]
        refused = (await clients[1].post("/jobs", json=body)).json()["error"]
        assert (refused["code"], refused["detail"]["expected"], refused["detail"]["got"]) == ("quota_exceeded", 50, 60)

        job = await two.worker.store.change("acme", job_id, lambda found: claimed(found, 1, two.worker.name))
        await two.worker.store.change("acme", job_id, lambda found: progressed(found, 1, {}, "training", 4))
        await two.worker._end(job, lambda found: failed(found, 1, Failure("disk_full", "no room")))
        answers = [await client.post("/jobs", json=body) for client in clients]
        assert [answer.status_code for answer in answers] == [201, 403]
        assert answers[1].json()["error"]["detail"]["got"] == 4 + 30 + 30

        small = {**body, "hyperparameters": {"batch_size": 3, "epochs": 1}}
        answers = await asyncio.gather(*(client.post("/jobs", json=small) for client in clients * 2))
        assert sorted(answer.status_code for answer in answers) == [201, 403, 403, 403]
        assert {answer.json()["error"]["detail"]["limit"] for answer in answers if answer.status_code == 403} == {
            "open_jobs"
        }

    async def run(url: str) -> None:
        given = {"data": str(tmp_path / "data"), "registry": f"{url}/0", "redis": f"{url}/1"}
        async with AsyncExitStack() as stack:
            trainers = []
            for _ in range(2):
                trainers.append(await assemble(load_settings(TrainerSettings, given, config=None)))
                stack.push_async_callback(trainers[-1].close)
            await test(*trainers)

    with RedisServer(append_only=True) as server:
        asyncio.run(run(server.url.rstrip("/").removesuffix("/0")))
