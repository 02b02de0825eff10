"""Streams over raw ASGI: pieces, heartbeats, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import pytest
from starlette.types import Message

from server.web.responses import to_json
from server.web.sse import HEARTBEAT, ClientLeft, EventStreamResponse, data_event, event, until_disconnect


class Connection:
    """A client at the other end of an ASGI response; it leaves when ``leave`` is set."""

    def __init__(self) -> None:
        self.sent: list[MutableMapping[str, Any]] = []
        self.leave = asyncio.Event()

    async def receive(self) -> Message:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def run_stream(
    make_body: Callable[[Connection, asyncio.Event], AsyncIterator[bytes]], heartbeat_s: float = 60
) -> tuple[Connection, bool]:
    """Send a stream to its end; returns the connection and whether the work was aborted."""

    async def run() -> tuple[Connection, bool]:
        connection, aborted = Connection(), asyncio.Event()
        response = EventStreamResponse(make_body(connection, aborted), abort=aborted.set, heartbeat_s=heartbeat_s)
        await asyncio.wait_for(response({"type": "http"}, connection.receive, connection.send), 5)
        return connection, aborted.is_set()

    return asyncio.run(run())


def test_a_stream_sends_each_piece_at_once_and_ends_the_body() -> None:
    async def body(connection: Connection, aborted: asyncio.Event) -> AsyncIterator[bytes]:
        yield event("token", b"1")
        assert connection.body == b"event: token\ndata: 1\n\n"
        yield event("done", b"2")

    connection, aborted = run_stream(body)
    assert connection.body == b"event: token\ndata: 1\n\nevent: done\ndata: 2\n\n"
    assert [message.get("more_body") for message in connection.sent[1:]] == [True, True, False]
    assert b"content-length" not in dict(connection.sent[0]["headers"])
    assert not aborted


def test_a_client_that_leaves_aborts_the_work_and_gets_nothing_more() -> None:
    async def body(connection: Connection, aborted: asyncio.Event) -> AsyncIterator[bytes]:
        yield b"first"
        connection.leave.set()
        await aborted.wait()
        yield b"last"

    connection, aborted = run_stream(body)
    assert (connection.body, aborted) == (b"first", True)


def test_a_silent_stream_gets_heartbeats() -> None:
    async def body(connection: Connection, aborted: asyncio.Event) -> AsyncIterator[bytes]:
        while connection.body.count(HEARTBEAT) < 2:
            await asyncio.sleep(0.01)
        yield b"data: x\n\n"

    connection, _ = run_stream(body, heartbeat_s=0.02)
    assert connection.body.startswith(HEARTBEAT * 2)
    assert connection.body.endswith(b"data: x\n\n")


def test_a_stream_that_breaks_aborts_the_work() -> None:
    aborted = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise RuntimeError("broken")

    async def run() -> None:
        connection = Connection()
        response = EventStreamResponse(body(), abort=aborted.set, heartbeat_s=60)
        with pytest.raises(RuntimeError):
            await response({"type": "http"}, connection.receive, connection.send)

    asyncio.run(run())
    assert aborted.is_set()


def until(leave: bool, cancel: bool = False) -> tuple[Any, bool]:
    async def run() -> tuple[Any, bool]:
        connection, aborted = Connection(), asyncio.Event()

        async def work() -> str:
            if leave or cancel:
                await aborted.wait()
            return "whole" if not aborted.is_set() else "partial"

        waiting: Awaitable[Any] = asyncio.ensure_future(until_disconnect(connection.receive, work(), aborted.set))
        await asyncio.sleep(0)
        if leave:
            connection.leave.set()
        if cancel:
            waiting.cancel()  # type: ignore[attr-defined]
            with pytest.raises(asyncio.CancelledError):
                await waiting
            return None, aborted.is_set()
        return await asyncio.wait_for(waiting, 5), aborted.is_set()

    return asyncio.run(run())


def test_a_json_answer_is_aborted_when_its_client_leaves_or_its_task_is_cancelled() -> None:
    assert until(leave=False) == ("whole", False)
    with pytest.raises(ClientLeft):
        until(leave=True)
    assert until(leave=False, cancel=True) == (None, True)


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029"])
def test_an_event_is_one_line_for_clients_that_know_unicodes_line_separators_too(separator: str) -> None:
    body = {"text": f"a{separator}b{separator}", f"k{separator}": "\\" + separator}
    for sent in (event("token", to_json(body)), data_event(to_json(body))):
        lines = sent.decode().splitlines()
        (data,) = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert json.loads(data) == body
