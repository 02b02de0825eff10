"""The answer to ``POST /v1/completions``, for all prompts of a request: in one piece or as a stream of chunks.

Owns the order in which the prompts' events become chunks, and what one prompt's failure does to the others. Knows no
routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from server.engine.types import Event, Failed, Finished, TokenEvent
from server.openai.answers import ChunkWriter, chunk, completion, usage_body
from server.openai.offsets import TokenTexts
from server.service import Running
from server.web.errors import encode_error, error_of, openai_error_body
from server.web.responses import to_json
from server.web.sse import data_event


class Completion:
    """One request's answer, from all its prompts."""

    def __init__(
        self, id: str, model: str, running: Sequence[Running], texts: Sequence[TokenTexts], include_usage: bool
    ) -> None:
        """``texts`` has one for each prompt."""
        self._frame = (id, int(time.time()), model)
        self._running, self._texts, self._include_usage = running, texts, include_usage

    def abort(self) -> None:
        """Abort all prompts."""
        for running in self._running:
            running.stream.abort()

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece. If a prompt fails, the request fails and the other prompts are aborted."""
        try:
            finished = [await running.stream.result() for running in self._running]
        finally:
            self.abort()
        return completion(*self._frame, finished, self._texts)

    async def stream(self) -> AsyncIterator[bytes]:
        """``data:`` chunks, then ``data: [DONE]``. An error ends the stream, as with OpenAI; a chunk that cannot be
        encoded is one.
        """
        try:
            async for piece in self._chunks():
                yield piece
        except Exception as error:
            self.abort()
            yield data_event(encode_error(openai_error_body(error_of(error))))

    async def _chunks(self) -> AsyncIterator[bytes]:
        writers, first = [], 0
        for running, texts in zip(self._running, self._texts, strict=True):
            writers.append(ChunkWriter(first, texts))
            first += running.params.num_return_sequences
        ended: list[Finished] = []
        async for which, events in self._merged():
            choices: list[dict[str, Any]] = []
            for event in events:
                if isinstance(event, TokenEvent):
                    choices += writers[which].token(event)
                elif isinstance(event, Failed):
                    raise event.error
                else:
                    choices += writers[which].end(event)
                    ended.append(event)
            if choices:
                yield b"".join(self._chunk([one], None) for one in choices)
        if self._include_usage:
            yield self._chunk([], usage_body([finished.usage for finished in ended]))
        yield data_event(b"[DONE]")

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        """With ``include_usage`` every chunk has ``usage``, null in all but the last."""
        body = chunk(*self._frame, choices)
        return data_event(to_json({**body, "usage": usage} if self._include_usage else body))

    async def _merged(self) -> AsyncIterator[tuple[int, list[Event]]]:
        """The events of all prompts as they come, with their prompt's index."""
        if len(self._running) == 1:
            stream = self._running[0].stream
            async for event in stream:
                yield 0, [event, *stream.take_ready()]
            return
        arrived: asyncio.Queue[tuple[int, list[Event]]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(which, one, arrived)) for which, one in enumerate(self._running)]
        try:
            left = len(pumps)
            while left:
                which, events = await arrived.get()
                left -= isinstance(events[-1], Finished | Failed)
                yield which, events
        finally:
            for pump in pumps:
                pump.cancel()


async def _pump(which: int, running: Running, arrived: asyncio.Queue[tuple[int, list[Event]]]) -> None:
    async for event in running.stream:
        arrived.put_nowait((which, [event, *running.stream.take_ready()]))
