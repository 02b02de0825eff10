"""Server-sent events over raw ASGI: pre-encoded bytes, one send for all that is ready.

Owns the wire form, the heartbeat, and what happens when the client leaves, also while it waits for a JSON answer. Knows
no body's content.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

HEARTBEAT: Final = b": \n\n"
_SEPARATORS: Final = {mark.encode(): f"\\u{ord(mark):04x}".encode() for mark in "\x85\u2028\u2029"}


def event(name: str, data: bytes, *, event_id: str | None = None) -> bytes:
    """One named event. ``data``, which is JSON, and ``event_id`` are one line each."""
    numbered = b"" if event_id is None else b"id: " + event_id.encode() + b"\n"
    return numbered + b"event: " + name.encode() + b"\ndata: " + _one_line(data) + b"\n\n"


def data_event(data: bytes) -> bytes:
    """One event without a name, as in OpenAI's streams."""
    return b"data: " + _one_line(data) + b"\n\n"


def _one_line(data: bytes) -> bytes:
    """JSON with the line separators escaped that only Unicode knows: some clients end a line there."""
    for separator, escaped in _SEPARATORS.items():
        if separator in data:  # rare, and then only within strings
            data = data.replace(separator, escaped)
    return data


class EventStreamResponse(Response):
    """Sends each piece that ``body`` yields at once, and a comment every ``heartbeat_s`` seconds.

    When the client disconnects, ``abort`` is called and ``body`` is read to its end without sending, so ``abort`` must
    make it end. ``abort`` is also called when sending fails, ``body`` raises, or the task is cancelled.
    """

    def __init__(
        self,
        body: AsyncIterator[bytes],
        *,
        abort: Callable[[], None],
        heartbeat_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            None,
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})},
        )
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._body = body
        self._abort = abort
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream as an ASGI application."""
        left = asyncio.Event()
        watcher: asyncio.Task[None] | None = None
        ended = False
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            watcher = asyncio.create_task(self._watch(receive, send, left))
            async for piece in self._body:
                if not left.is_set():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            ended = True
            watcher.cancel()
            if not left.is_set():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if watcher:
                watcher.cancel()
            if not ended:
                self._abort()

    async def _watch(self, receive: Receive, send: Send, left: asyncio.Event) -> None:
        """Wait for the client to leave. Meanwhile send heartbeats, so that the connection does not look dead."""
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    message = await receive()
            except TimeoutError:
                await send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})
                continue
            if message["type"] == "http.disconnect":
                left.set()
                self._abort()
                return


class ClientLeft(Exception):
    """The client has disconnected: there is nobody to answer."""


async def until_disconnect(receive: Receive, work: Awaitable[Any], abort: Callable[[], None]) -> Any:
    """The result of ``work``.

    If the client disconnects first, ``abort`` is called, ``work`` is awaited to its end, and ClientLeft is raised.
    ``abort`` is also called when this task is cancelled.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            abort()
            await asyncio.wait({task})
            raise ClientLeft
        return await task
    finally:
        watcher.cancel()
        if not task.done():
            abort()
            task.cancel()


async def unless_disconnected(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of ``work``. If the client disconnects first, ``work`` is cancelled and ClientLeft is raised."""
    scope = anyio.CancelScope()

    async def cancellable() -> Any:
        with scope:
            return await work

    return await until_disconnect(receive, cancellable(), scope.cancel)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
