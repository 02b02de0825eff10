"""Clocks that the test owns: an event loop's, with senders of bodies that go by it, and one to put forward.

Knows no test.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from starlette.types import Message


class CountedLoop(asyncio.SelectorEventLoop):
    """Its clock stands still but for the waits of its timers, which it jumps over: no test waits for real."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        due = [timer.when() for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        if not self._ready and due:  # type: ignore[attr-defined]
            self.now = max(self.now, min(due))
        super()._run_once()  # type: ignore[misc]


class Ahead:
    """Takes the place of ``time`` in a module: the real clock, put forward by ``seconds``."""

    seconds = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.seconds


def run(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=CountedLoop) as runner:
        runner.run(test)


class Sender:
    """Pieces of ``size`` bytes, ``pause`` seconds before each; ``count`` of them, then nothing."""

    def __init__(self, size: int, pause: float, count: int = 1 << 30) -> None:
        self.size, self.pause, self.left = size, pause, count

    async def receive(self) -> Message:
        await asyncio.sleep(self.pause if self.left else 1e9)
        self.left -= 1
        return {"type": "http.request", "body": bytes(self.size), "more_body": True}
