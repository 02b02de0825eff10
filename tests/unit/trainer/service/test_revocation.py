"""What a trainer does for a key that ends while its upload or its stream goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from prefixes.tenancy.directory import Directory, NewKey
from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.callers import bearer
from tests.support.datasets import lines
from trainer.service.app import create_public
from trainer.service.assembly import assemble
from trainer.service.settings import TrainerSettings

PATIENCE_S = 20
Test = Callable[[httpx.AsyncClient, NewKey, Callable[[], None]], Coroutine[Any, Any, None]]


def with_key(tmp_path: Path, test: Test) -> None:
    """Run ``test`` with a client, a key that may train, and a call that ends it."""

    async def run() -> None:
        given = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry")}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        directory, keyring = Directory(trainer.worker.registry.tenancy), trainer.runtime.keyring  # type: ignore[attr-defined]
        made = directory.create_key("acme", "x", ["train", "publish"], actor="t")
        keyring.look()

        def revoke() -> None:
            directory.revoke(made.key.id, actor="t")
            keyring.look()

        transport = httpx.ASGITransport(create_public(trainer.runtime, Intake(60, 1 << 20)))
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", headers=bearer(made.secret)
            ) as client:
                await test(client, made, revoke)
        finally:
            await trainer.close()

    asyncio.run(run())


def test_a_dataset_that_arrives_after_its_key_has_ended_is_not_kept(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, made: NewKey, revoke: Callable[[], None]) -> None:
        async def body() -> AsyncIterator[bytes]:
            data = lines(3)
            yield data[:-1]
            revoke()
            yield data[-1:]

        assert (await client.post("/datasets", content=body())).status_code == 401
        assert not list((tmp_path / "data").rglob("*.jsonl"))

    with_key(tmp_path, test)


def test_a_stream_of_a_jobs_events_ends_with_its_key(tmp_path: Path) -> None:
    """It lasts as long as the job, which may be days."""

    async def test(client: httpx.AsyncClient, made: NewKey, revoke: Callable[[], None]) -> None:
        dataset = (await client.post("/datasets", content=lines(3))).json()["dataset"]
        job = (await client.post("/jobs", json={"task": "e2e", "dataset": dataset})).json()["id"]
        async with asyncio.timeout(PATIENCE_S):
            stream = asyncio.create_task(client.get(f"/jobs/{job}/events"))
            await asyncio.sleep(0.1)
            assert not stream.done()
            revoke()
            told = await stream
        assert told.status_code == 200
        assert told.text.count("event: state") == 1
        assert (await client.get(f"/jobs/{job}/events")).status_code == 401

    with_key(tmp_path, test)
