"""What a trainer's route does with a caller who stands still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.web.errors import InvalidRequest
from trainer.service.routes import datasets


def test_an_upload_that_stands_still_is_ended_and_gives_its_place_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "IDLE_S", 0.05)
    left: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        yield b"begun"
        try:
            await asyncio.sleep(60)
        finally:
            left.append("closed")

    async def read() -> None:
        body = pieces()
        assert await datasets._next(body) == b"begun"
        with pytest.raises(InvalidRequest, match="more of it"):
            await datasets._next(body)
        assert await datasets._next(body) is None

    asyncio.run(read())
    assert left == ["closed"]


def test_an_upload_that_trickles_is_ended_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "IDLE_S", 1.0)

    class Trickle:
        async def stream(self) -> AsyncIterator[bytes]:
            for _ in range(100_000):
                yield b"x"
                await asyncio.sleep(0.01)

    with pytest.raises(InvalidRequest, match=r"expected 1024 bytes a second or more, got \d+ in"):
        asyncio.run(datasets._read(Trickle(), None))  # type: ignore[arg-type]
