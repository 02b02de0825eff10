"""What a trainer's process makes of its registry when it starts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import RegistryMissing, RegistryUnavailable, WrongRegistry
from prefixes.registry import open_registry
from server.web.settings_sources import load_settings
from tests.support.redis_server import RedisServer
from trainer.service import landlock
from trainer.service.assembly import assemble
from trainer.service.settings import TrainerSettings


def start(tmp_path: Path, **given: Any) -> None:
    async def body() -> None:
        settings = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry"), **given}
        await (await assemble(load_settings(TrainerSettings, settings, config=None))).close()

    asyncio.run(body())


def test_a_trainer_that_knows_its_registrys_id_makes_no_new_one(tmp_path: Path) -> None:
    """One of the same id in place of an emptied one passed for it: running servers forgot every task."""
    registry = open_registry(str(tmp_path / "registry"))
    start(tmp_path, registry_id=registry.id)
    with pytest.raises(WrongRegistry, match=f"expected another, got {registry.id}"):
        start(tmp_path, registry_id="another")
    with RedisServer() as server:
        with pytest.raises(RegistryMissing):
            start(tmp_path, registry=server.url, registry_id=registry.id)
        with server.client() as client:
            assert client.dbsize() == 0


def test_a_redis_that_would_lose_prefixes_is_refused_and_a_doubtful_one_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evicting = {"maxmemory-policy": "allkeys-lru", "maxmemory": "100mb"}
    with RedisServer(config=evicting) as server, pytest.raises(RegistryUnavailable, match="-policy noeviction"):
        start(tmp_path, registry=server.url)
    with RedisServer(append_only=False) as server:
        start(tmp_path, registry=server.url)
        assert "set `appendonly yes`" in caplog.text


@pytest.mark.parametrize(
    ("given", "known", "reason"),
    [
        ({}, 7, None),
        ({}, 0, "the kernel has no Landlock, or refuses it"),
        ({"confine_jobs": False}, 7, "--no-confine-jobs"),
        ({"workers": 0}, 0, None),
    ],
)
def test_where_jobs_are_not_confined_a_trainer_says_so_once_and_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: Any,
    known: int,
    reason: str | None,
) -> None:
    monkeypatch.setattr(landlock, "version", lambda: known)
    start(tmp_path, **given)
    told = [record for record in caplog.records if "can read what the trainer's user can" in record.message]
    assert [record.facts for record in told] == ([] if reason is None else [{"reason": reason}])  # type: ignore[attr-defined]
