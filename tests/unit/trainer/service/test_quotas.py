"""A tenant's and a key's limits of open jobs and of bytes of datasets, over the trainer's API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import NO_LIMITS, Limits
from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.callers import bearer
from tests.support.datasets import line, lines
from tests.support.limits import set_limits
from trainer.service.app import create_public
from trainer.service.assembly import AssembledTrainer, assemble
from trainer.service.settings import TrainerSettings

SMALL, OTHER = lines(3), lines(4)


@dataclass
class Served:
    """A trainer in this process, with two tenants; acme has two keys."""

    trainer: AssembledTrainer
    client: httpx.AsyncClient
    keys: dict[str, tuple[str, str]]  # name -> id and secret

    def limit(self, tenant: Limits = NO_LIMITS, **keys: Limits) -> None:
        """Give acme and its keys these limits."""
        tenancy = self.trainer.worker.registry.tenancy  # type: ignore[attr-defined]
        own = {self.keys[name][0]: one for name, one in keys.items()}
        set_limits(tenancy, tenants={"acme": tenant}, keys=own)
        self.trainer.runtime.keyring.look()

    async def upload(self, content: bytes = SMALL, key: str = "one") -> httpx.Response:
        return await self.client.post("/datasets", content=content, headers=bearer(self.keys[key][1]))

    async def post(self, path: str, body: object = None, key: str = "one") -> httpx.Response:
        return await self.client.post(path, json=body, headers=bearer(self.keys[key][1]))

    async def submit(self, key: str = "one", **fields: object) -> httpx.Response:
        dataset = (await self.upload(key=key)).json()["dataset"]
        return await self.post("/jobs", {"task": "e2e", "dataset": dataset, "evaluation": None, **fields}, key)


def served(tmp_path: Path, test: Callable[[Served], Awaitable[None]]) -> None:
    async def run() -> None:
        given = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry")}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        directory = Directory(trainer.worker.registry.tenancy)  # type: ignore[attr-defined]
        keys = {}
        for name, tenant in (("one", "acme"), ("two", "acme"), ("foreign", "globex")):
            made = directory.create_key(tenant, name, ["train", "publish"], actor="t")
            keys[name] = made.key.id, made.secret
        trainer.runtime.keyring.look()
        transport = httpx.ASGITransport(create_public(trainer.runtime, Intake(60, 1 << 20)))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                await test(Served(trainer, client, keys))
        finally:
            await trainer.close()

    asyncio.run(run())


def refusal(answer: httpx.Response) -> tuple[int, str, object]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["detail"]


def test_a_tenants_open_jobs_are_bounded_by_its_limit_whichever_key_asks(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(open_jobs=2))
        first = (await trainer.submit("one")).json()["id"]
        assert (await trainer.submit("two")).status_code == 201
        told = {"limit": "open_jobs", "of": "tenant", "expected": 2, "got": 3}
        for key in ("one", "two"):
            assert refusal(await trainer.submit(key)) == (403, "quota_exceeded", told)
        assert (await trainer.submit("foreign")).status_code == 201
        assert (await trainer.post(f"/jobs/{first}/cancel")).status_code == 200
        assert (await trainer.submit("two")).status_code == 201
        assert refusal(await trainer.post(f"/jobs/{first}/retry"))[:2] == (403, "quota_exceeded")

    served(tmp_path, test)


def test_a_keys_open_jobs_are_bounded_by_its_own_limit_inside_its_tenants(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(Limits(open_jobs=3), one=Limits(open_jobs=1))
        first = (await trainer.submit("one")).json()["id"]
        told = {"limit": "open_jobs", "of": "key", "expected": 1, "got": 2}
        assert refusal(await trainer.submit("one")) == (403, "quota_exceeded", told)
        assert (await trainer.submit("two")).status_code == 201
        await trainer.post(f"/jobs/{first}/cancel")
        assert (await trainer.post(f"/jobs/{first}/retry", key="two")).status_code == 200  # it is the other key's now
        assert (await trainer.submit("one")).status_code == 201

    served(tmp_path, test)


def test_a_limit_of_nothing_takes_no_job_and_no_dataset(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        dataset = (await trainer.upload()).json()["dataset"]
        trainer.limit(Limits(open_jobs=0, dataset_bytes=0))
        body = {"task": "e2e", "dataset": dataset}
        assert refusal(await trainer.post("/jobs", body))[:2] == (403, "quota_exceeded")
        assert refusal(await trainer.upload(OTHER))[:2] == (403, "quota_exceeded")

    served(tmp_path, test)


def test_a_tenants_bytes_of_datasets_are_bounded_whichever_key_uploads(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        size = len(SMALL) + len(OTHER)
        trainer.limit(Limits(dataset_bytes=size - 1))
        assert (await trainer.upload(SMALL, "one")).status_code == 201
        told = {"limit": "dataset_bytes", "of": "tenant", "expected": size - 1, "got": size}
        assert refusal(await trainer.upload(OTHER, "two")) == (403, "quota_exceeded", told)
        assert (await trainer.upload(OTHER, "foreign")).status_code == 201
        assert (await trainer.upload(SMALL, "two")).status_code == 201, "it is there"
        headers = bearer(trainer.keys["one"][1])
        listed = (await trainer.client.get("/datasets", headers=headers)).json()["datasets"]
        assert len(listed) == 1
        await trainer.client.delete(f"/datasets/{listed[0]['dataset']}", headers=headers)
        assert (await trainer.upload(OTHER, "two")).status_code == 201

    served(tmp_path, test)


def test_a_keys_bytes_are_those_that_it_uploaded(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        trainer.limit(one=Limits(dataset_bytes=len(OTHER)))
        assert (await trainer.upload(SMALL, "two")).status_code == 201
        assert (await trainer.upload(OTHER, "one")).status_code == 201
        assert refusal(await trainer.upload(lines(2), "one"))[2]["of"] == "key"  # type: ignore[index]
        assert (await trainer.upload(lines(2), "two")).status_code == 201

    served(tmp_path, test)


def test_of_uploads_that_come_together_no_more_pass_than_there_is_room_for(tmp_path: Path) -> None:
    async def test(trainer: Served) -> None:
        contents = [lines(3) + line(number) for number in range(10, 14)]
        assert {len(content) for content in contents} == {len(contents[0])}
        trainer.limit(Limits(dataset_bytes=2 * len(contents[0])))
        answers = await asyncio.gather(*(trainer.upload(content) for content in contents))
        assert sorted(answer.status_code for answer in answers) == [201, 201, 403, 403]

    served(tmp_path, test)


def test_an_upload_above_the_whole_limit_ends_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    asked = 0

    async def body() -> object:
        nonlocal asked
        while asked < 100:
            asked += 1
            yield lines(20_000)

    async def test(trainer: Served) -> None:
        trainer.limit(Limits(dataset_bytes=1000))
        answer = await trainer.client.post("/datasets", content=body(), headers=bearer(trainer.keys["one"][1]))  # type: ignore[arg-type]
        assert refusal(answer)[:2] == (403, "quota_exceeded")
        assert asked < 10

    served(tmp_path, test)
