"""uvicorn, for services that handle their signals and their drain themselves.

Owns uvicorn's configuration, and how a listener ends: nothing that has connected is cut off while it can still get an
answer. Knows no application.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import select
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, cast

import uvicorn

from server.web.connection_settings import ConnectionSettings
from server.web.intake import Intake
from server.web.protocol import SURPLUS, BoundedProtocol, ConnectionBounds

if TYPE_CHECKING:  # a taken port fails before the application's imports
    from fastapi import FastAPI

FLUSH_S: Final = 5
"""Seconds that clients get to read the rest of their answers after the last row has ended."""

LAST_BODIES_S: Final = 2.0
"""Of those, seconds that bodies get to arrive whole. Then they are refused."""

LAST_CALL_S: Final = 0.5
"""Seconds for which a connection stays open for a request that may be on its way: after it was made or last used."""

SAME_SIGNAL_S: Final = 0.5
"""A further signal within this time is the same one delivered twice, for example to the process group and by `make`."""

OTHER_FILES: Final = 256
"""Open files that a process needs beside its connections."""


def configured(app: FastAPI, settings: ConnectionSettings, *, lifespan: bool) -> uvicorn.Config:
    """uvicorn's configuration. ``lifespan`` says whether uvicorn runs the application's lifespan."""
    bounds = ConnectionBounds(
        settings.header_timeout_s, settings.write_timeout_s, connection_limit(settings.max_connections)
    )
    return uvicorn.Config(
        app,
        http=functools.partial(BoundedProtocol, bounds=bounds),  # type: ignore[arg-type]  # uvicorn only calls it
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on" if lifespan else "off",
        timeout_keep_alive=75,
    )


def connection_limit(wanted: int) -> int:
    """``wanted`` connections on each of two ports, or as many as this process may have files open for.

    Raises the soft limit of open files if the hard one allows.
    """
    needed = 2 * (wanted + SURPLUS) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    return max(1, (soft - OTHER_FILES) // 2 - SURPLUS)


class Listener(uvicorn.Server):
    """uvicorn's server without its signal handlers, because the service has its own, and with an end of its own."""

    def __init__(self, config: uvicorn.Config, intake: Intake) -> None:
        super().__init__(config)
        self._intake = intake

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what has connected, close the sockets, and give the rest ``FLUSH_S`` to end.

        An idle connection is closed only when nothing has come over it. What is left at last is aborted if its answer
        has begun, and cancelled, which means a 503, if not.
        """
        loop, state = asyncio.get_running_loop(), self.server_state
        connections = cast("set[BoundedProtocol]", state.connections)  # this listener makes no others
        began = loop.time()
        self._intake.draining = True
        await self._accept_last(sockets or [])
        while (connections or state.tasks) and (passed := loop.time() - began) < FLUSH_S:
            if passed >= LAST_BODIES_S:
                self._intake.close()
            for connection in list(connections):
                _close_if_idle(connection, loop.time() - LAST_CALL_S)
            await asyncio.sleep(0.02)
        for connection in list(connections):
            if connection.idle or connection.cycle.response_started:
                connection.transport.abort()
        await asyncio.sleep(0)  # those who answer see that their client has gone
        for task in list(state.tasks):
            task.cancel()
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=LAST_CALL_S)
        await self.lifespan.shutdown()

    async def _accept_last(self, sockets: list[socket.socket]) -> None:
        """Close the listening sockets. What the system has accepted for us by then is served."""
        accepted = [connection for sock in sockets for connection in _pending(sock)]
        for server in self.servers:
            server.close()
        protocol = cast("functools.partial[BoundedProtocol]", self.config.http_protocol_class)
        create = functools.partial(
            protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        for connection in accepted:
            await asyncio.get_running_loop().connect_accepted_socket(create, connection)


def _pending(sock: socket.socket) -> Iterator[socket.socket]:
    while True:
        try:
            connection, _ = sock.accept()
        except OSError:
            return
        connection.setblocking(False)
        yield connection


def _close_if_idle(connection: BoundedProtocol, since: float) -> None:
    """Close a connection that has had no request since then, unless bytes of one wait to be read."""
    if not connection.idle or connection.idle_since > since or connection.transport.is_closing():
        return
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
    if not poll.poll(0):
        connection.transport.close()
