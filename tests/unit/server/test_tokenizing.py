"""Long texts are tokenised a few at a time; others wait, within bounds, and may leave."""

from __future__ import annotations

import asyncio
import threading
from typing import cast

import pytest

from prefixes.errors import QueueFull
from prefixes.prompt import Fitted, PromptEncoder
from server.tokenizing import LONG_TEXT, Tokenizing

LONG = "x" * (LONG_TEXT + 1)


class Held:
    """An encoder whose texts take until they are released."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.bounds: set[int] = set()
        self.at_once = self.most = 0
        self.release = threading.Event()
        self._lock = threading.Lock()

    def refused(self, template: str, text: str, room: int) -> Fitted | None:
        return Fitted(None, 99, at_least=True) if text.startswith("refused") else None

    def fit(self, template: str, text: str, room: int, *, truncate: bool, max_bytes: int) -> Fitted:
        with self._lock:
            self.begun.append(text)
            self.bounds.add(max_bytes)
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        if len(text) > LONG_TEXT:
            assert threading.current_thread() is not threading.main_thread()
            assert self.release.wait(30)
        with self._lock:
            self.at_once -= 1
        return Fitted((1,), 1)


async def begun(held: Held, count: int) -> None:
    async with asyncio.timeout(30):
        while len(held.begun) < count:
            await asyncio.sleep(0.001)


def start(tokenizing: Tokenizing, held: Held, text: str, truncate: bool = False) -> asyncio.Task[Fitted]:
    return asyncio.create_task(tokenizing.fit(cast(PromptEncoder, held), "{input}", text, 9, truncate))


def test_so_many_long_texts_at_once_and_no_more_wait_than_may() -> None:
    async def run() -> None:
        held, tokenizing = Held(), Tokenizing(threads=2, max_bytes=777, max_waiting=3)
        taken: list[asyncio.Task[Fitted]] = [start(tokenizing, held, LONG) for _ in range(5)]
        await begun(held, 2)
        with pytest.raises(QueueFull) as caught:
            await start(tokenizing, held, LONG)
        assert caught.value.detail == {"expected": 3, "got": 3, "retry_after_s": 1}
        assert await start(tokenizing, held, "short") == Fitted((1,), 1), "a short one does not wait"
        assert (await start(tokenizing, held, "refused" + LONG)).at_least, "nor one that is refused by its length"
        held.release.set()
        assert await asyncio.gather(*taken) == [Fitted((1,), 1)] * 5
        assert (held.most, held.begun.count(LONG), held.bounds) == (3, 5, {777})  # two long ones, and the short one

    asyncio.run(run())


def test_who_is_cancelled_while_waiting_is_never_tokenised() -> None:
    async def run() -> None:
        held, tokenizing = Held(), Tokenizing(threads=1, max_bytes=777, max_waiting=3)
        first = start(tokenizing, held, LONG)
        await begun(held, 1)
        left = start(tokenizing, held, LONG + "left")
        last = start(tokenizing, held, LONG + "last")
        await asyncio.sleep(0)
        left.cancel()
        held.release.set()
        results = await asyncio.gather(first, left, last, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert held.begun == [LONG, LONG + "last"]

    asyncio.run(run())


def test_short_texts_give_the_loop_to_others_in_between() -> None:
    async def run() -> None:
        held, tokenizing, turns = Held(), Tokenizing(threads=1, max_bytes=777, max_waiting=3), 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(other())
        for _ in range(100):
            await tokenizing.fit(cast(PromptEncoder, held), "{input}", "short", 9, False)
        ticking.cancel()
        assert turns >= 99

    asyncio.run(run())
