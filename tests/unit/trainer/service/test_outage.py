"""A trainer whose registry is away for longer than keys work: it is not ready, and goes on being watched."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from prefixes.tenancy import keyring
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.store import TenancyStore
from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.clock import Ahead
from tests.support.outlasting import DAY_S, TOLD, Outage, check_refused
from trainer.service.app import create_admin, create_public
from trainer.service.assembly import assemble
from trainer.service.settings import TrainerSettings

WORDS = "keys cannot be checked: the registry has been away for more than 60 s"
Test = Callable[[httpx.AsyncClient, httpx.AsyncClient, TenancyStore, Keyring], Awaitable[None]]


def with_trainer(tmp_path: Path, test: Test) -> None:
    """Run ``test`` with clients of both ports, and what the trainer knows of keys."""

    async def run() -> None:
        given = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry")}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        public, admin = (
            httpx.AsyncClient(transport=httpx.ASGITransport(make(trainer.runtime, Intake(60, 1 << 20))))
            for make in (create_public, create_admin)
        )
        public.base_url = admin.base_url = httpx.URL("http://localhost")
        store: TenancyStore = trainer.worker.registry.tenancy  # type: ignore[attr-defined]
        try:
            await test(public, admin, store, trainer.runtime.keyring)
        finally:
            await trainer.close()

    asyncio.run(run())


def test_a_trainer_with_keys_is_watched_and_not_ready_once_no_key_can_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(
        public: httpx.AsyncClient, admin: httpx.AsyncClient, store: TenancyStore, ring: Keyring
    ) -> None:
        away = Outage.of(tmp_path / "registry", store, ring, monkeypatch)
        away.begin()
        for away.clock.seconds, works in ((0, True), (55, True), (61, False), (30 * DAY_S, False)):
            assert await away.metrics(admin) == TOLD, away.clock.seconds
            for client in (public, admin):
                ready = await client.get("/ready")
                if works:
                    assert ready.status_code == 200, ready.text
                else:
                    check_refused(ready, WORDS)
                assert (await client.get("/health")).status_code == 200
            jobs = await public.get("/jobs", headers=away.headers["operator"])
            assert (jobs.status_code == 200) == works, jobs.text
        away.end()
        assert (await public.get("/ready")).status_code == 200
        assert (await public.get("/jobs", headers=away.headers["operator"])).status_code == 200

    with_trainer(tmp_path, test)


def test_an_open_trainer_stays_ready_without_its_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(
        public: httpx.AsyncClient, admin: httpx.AsyncClient, store: TenancyStore, ring: Keyring
    ) -> None:
        clock = Ahead()
        monkeypatch.setattr(keyring, "time", clock)
        (tmp_path / "registry").rename(tmp_path / "away")
        ring.look()
        clock.seconds = DAY_S
        assert (await public.get("/ready")).status_code == 200
        assert (await public.get("/jobs")).status_code == 200

    with_trainer(tmp_path, test)
