"""``POST /datasets`` in this process: who may send is settled first, and slow senders hold up nobody for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from server.web import upload_places
from server.web.errors import Forbidden
from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.datasets import lines
from trainer.service import runtime
from trainer.service.app import create_public
from trainer.service.assembly import assemble
from trainer.service.settings import TrainerSettings

PATIENCE_S = 20


class Trickle:
    """A body of a few bytes now and then, without end. ``asked`` counts how often it was read."""

    def __init__(self) -> None:
        self.asked = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.asked += 1
            yield b" "
            await asyncio.sleep(0.05)


def with_client(tmp_path: Path, test: Any) -> None:
    async def run() -> None:
        given = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry")}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        transport = httpx.ASGITransport(create_public(trainer.runtime, Intake(60, 1 << 20)))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                await test(client)
        finally:
            await trainer.close()

    asyncio.run(run())


def test_four_slow_uploads_do_not_keep_out_a_fifth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1.2 KB/s they were within every bound, and a fifth upload got no answer while they lasted."""
    monkeypatch.setattr(upload_places, "GRACE_S", 0.2)

    async def test(client: httpx.AsyncClient) -> None:
        slow = [asyncio.create_task(client.post("/datasets", content=Trickle())) for _ in range(4)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(PATIENCE_S):
            fifth = await client.post("/datasets", content=lines(3))
            assert fifth.status_code == 201, fifth.text
            (gone, *_), _ = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        answer = gone.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    monkeypatch.setattr("server.web.bodies.LINGER_S", 0.1)
    with_client(tmp_path, test)


def test_no_byte_is_read_of_an_upload_that_may_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise Forbidden("expected the scope train")

    monkeypatch.setattr(runtime, "authorize", refuse)

    async def test(client: httpx.AsyncClient) -> None:
        body = Trickle()
        async with asyncio.timeout(PATIENCE_S):
            answer = await client.post("/datasets", content=body)
        assert (answer.status_code, body.asked) == (403, 0)
        assert not list((tmp_path / "data").rglob("*upload*"))

    with_client(tmp_path, test)
