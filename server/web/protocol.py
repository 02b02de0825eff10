"""One connection: uvicorn's protocol over h11, with bounds on what a client may leave undone.

Owns the time that headers may take, the time for which a client may read nothing, and what happens to one connection
too many. Bodies are the ``intake``'s. No timer is set for a token or a piece: a timer for headers runs until they are
whole, and one for writing only while the client's side is full.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, cast

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from prefixes.errors import PrefixdError
from server.web.errors import (
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    encode_error,
    error_body,
    error_response,
    status_of,
)

SURPLUS: Final = 64
"""Connections beyond the limit that still get an answer. Further ones are closed without one."""
STALL_CHECKS: Final = 4
"""How often, within the time for which a client may read nothing, its progress is looked at."""

_log = logging.getLogger("prefixd.http")


@dataclass(frozen=True)
class ConnectionBounds:
    """What a connection is granted."""

    header_timeout_s: float
    write_timeout_s: float
    max_connections: int


class BoundedProtocol(H11Protocol):
    """Closes a connection whose headers do not arrive, and aborts one whose client does not read."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        bounds: ConnectionBounds,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.idle_since = self.loop.time()
        self._bounds = bounds
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._unsent = self._unmoved = 0
        self._moved = False

    @property
    def idle(self) -> bool:
        """Whether no request is being answered. The next one's headers may be on their way."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect headers; make room if there are too many connections."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing() is called as soon as the client's side is full
        self._expect_arrival()
        if len(self.connections) > self._bounds.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        super().connection_lost(exc)
        for timer in (self._arrival, self._stall):
            if timer:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Take ``data``, and expect the rest of what it begins."""
        super().data_received(data)
        self._expect_arrival()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self.idle_since = self.loop.time()
        self._expect_arrival()

    def pause_writing(self) -> None:
        """The client's side is full: look from time to time whether it reads."""
        super().pause_writing()
        if self._stall is None:
            self._unsent, self._unmoved = self.transport.get_write_buffer_size(), 0
            self._look_again()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._moved = True

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the form of our errors."""
        self._refuse(InvalidRequest("request: expected HTTP/1.1, got what cannot be read as such"), status=400)

    def _expect_arrival(self) -> None:
        """Run one timer while a request's headers, or the rest of one that has been answered, are on their way."""
        if self.transport.is_closing():
            return
        rest = self.conn.their_state is h11.SEND_BODY
        on_its_way = self.idle and (self.cycle is None or rest or bool(self.conn.trailing_data[0]))
        if on_its_way and self._arrival is None:
            self._arrival = self.loop.call_later(self._bounds.header_timeout_s, self._arrived_not)
        elif not on_its_way and self._arrival:
            self._arrival.cancel()
            self._arrival = None
        if self.idle and not on_its_way and self.timeout_keep_alive_task is None:  # uvicorn's ended with the last byte
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _arrived_not(self) -> None:
        self._arrival = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            most = self._bounds.header_timeout_s
            self._refuse(RequestTimeout(f"headers: expected all of them within {most:g} s", expected=most))
        else:
            self.transport.close()

    def _refuse(self, error: PrefixdError, status: int | None = None) -> None:
        """Answer what is no request yet, and close. Where an answer has begun, only close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = status or status_of(error)
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            body = encode_error(error_body(error, None))
            for part in (
                h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(part) or b"")
        if not self.idle:  # its body cannot be read on
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _look_again(self) -> None:
        self._moved = False
        self._stall = self.loop.call_later(self._bounds.write_timeout_s / STALL_CHECKS, self._check_stall)

    def _check_stall(self) -> None:
        self._stall = None
        if not self.flow.write_paused:
            return
        unsent = self.transport.get_write_buffer_size()
        self._unmoved = 0 if self._moved or unsent < self._unsent else self._unmoved + 1
        self._unsent = unsent
        if self._unmoved < STALL_CHECKS:
            self._look_again()
            return
        _log.info("a client does not read", extra={"facts": {"unsent_bytes": unsent}})
        self.transport.abort()

    def _make_room(self) -> None:
        """Close the connection that has been idle for longest; if all are at work, answer this one with 503."""
        connections = cast("set[BoundedProtocol]", self.connections)  # this listener makes no others
        waiting = [one for one in connections if one is not self and _can_go(one)]
        if waiting:
            min(waiting, key=lambda one: one.idle_since).transport.close()
        elif len(self.connections) > self._bounds.max_connections + SURPLUS:
            self.transport.abort()
        else:
            self.app = _overloaded


def _can_go(connection: BoundedProtocol) -> bool:
    return connection.idle and not connection.transport.is_closing()


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(Overloaded("connections: expected fewer of them at once"), None)
    response.headers["connection"] = "close"
    await response(scope, receive, send)
