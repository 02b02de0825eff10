"""Tokenises inputs so that neither the event loop nor the engine waits for a long one.

Owns where a text is tokenised, how many long ones at once, and who waits. Each is bounded in bytes, so all are. Knows
no task and no HTTP.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

import anyio
import anyio.lowlevel
import anyio.to_thread

from prefixes.errors import QueueFull
from prefixes.prompt import Fitted, PromptEncoder

LONG_TEXT: Final = 4096
"""A text with more characters is tokenised off the event loop. For a shorter one the hop costs more than it saves."""


class Tokenizing:
    """Fits prompts into windows. Of at most ``threads`` long texts at once, ``max_bytes`` each are tokenised."""

    def __init__(self, threads: int, max_bytes: int, max_waiting: int) -> None:
        self._max_bytes, self._max_waiting = max_bytes, max_waiting
        self._slots = anyio.CapacityLimiter(threads)

    async def fit(self, encoder: PromptEncoder, template: str, text: str, room: int, truncate: bool) -> Fitted:
        """``PromptEncoder.fit``. Raises as it does, and QueueFull where too many long texts wait.

        Cancelled while it waits, it leaves the queue.
        """
        fit = partial(encoder.fit, template, text, room, truncate=truncate, max_bytes=self._max_bytes)
        if len(text) <= LONG_TEXT:
            await asyncio.sleep(0)  # a batch has many, and others want the loop between them
            return fit()
        if not truncate and (refused := encoder.refused(template, text, room)):
            return refused
        waiting = self._slots.statistics().tasks_waiting
        if waiting >= self._max_waiting:
            raise QueueFull(
                f"queue: expected at most {self._max_waiting} texts that wait to be tokenised, there are {waiting}",
                expected=self._max_waiting,
                got=waiting,
                retry_after_s=1,
            )
        fitted = await anyio.to_thread.run_sync(fit, limiter=self._slots)
        await anyio.lowlevel.checkpoint_if_cancelled()  # a thread cannot be cancelled, its request can
        return fitted
