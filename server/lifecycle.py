"""The server's process: its socket, its signals, its drain, its exit code.

Owns uvicorn. On the first SIGTERM or SIGINT nothing new is admitted and running rows finish while the socket stays
open, so that ``/ready`` and every refused request get a proper answer; then it exits with 0. A second signal, or the
drain timeout, aborts what still runs and the exit code is 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from prefixes.errors import PrefixdError
from server.settings import Settings

if TYPE_CHECKING:  # a taken port shows before torch is imported
    from fastapi import FastAPI

    from server.runtime import Runtime

FLUSH_S = 5
"""Seconds that clients get, after the last row has ended, to read the rest of their answers."""

SAME_SIGNAL_S = 0.5
"""A further signal this soon is the same one, delivered twice: to the process group and again by `make`, say."""

_log = logging.getLogger("prefixd.server")


class CannotListen(PrefixdError):
    """The address cannot be bound."""

    code = "cannot_listen"


def bind(settings: Settings) -> socket.socket:
    """The socket to serve on, bound and not yet listening. Raises CannotListen: before minutes go into loading."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError as error:
        sock.close()
        where = f"{settings.host} port {settings.port}"
        raise CannotListen(f"cannot listen on {where}: {error.strerror or error}") from None
    sock.set_inheritable(True)
    return sock


def serve(app: FastAPI, sock: socket.socket, settings: Settings) -> int:
    """Serve ``app`` on ``sock`` until a signal; returns the process's exit code."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=FLUSH_S,
    )
    server = _Server(config, app, sock, settings)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(server.run_to_end())


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI, sock: socket.socket, settings: Settings) -> None:
        super().__init__(config)
        self._app, self._sock, self._settings = app, sock, settings
        self._draining: asyncio.Task[None] | None = None
        self._drain_began = 0.0
        self._cut_short = asyncio.Event()
        self._exit_code = 0

    async def run_to_end(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        await self.serve(sockets=[self._sock])
        _log.info("stopped", extra={"facts": {"exit_code": self._exit_code}})
        return self._exit_code

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and say where."""
        await super().startup(sockets)
        host, port = self._sock.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        _log.info("ready", extra={"facts": {"url": url, "port": port, "backbone": self._settings.backbone}})

    def _on_signal(self, name: str) -> None:
        if not self.started:
            self.should_exit = True
        elif self._draining is None:
            _log.info("draining", extra={"facts": {"signal": name, "timeout_s": self._settings.drain_timeout_s}})
            self._drain_began = time.monotonic()
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        elif time.monotonic() - self._drain_began >= SAME_SIGNAL_S:
            _log.warning("aborting", extra={"facts": {"signal": name}})
            self._cut_short.set()

    async def _drain(self) -> None:
        engine = self._runtime.engine
        drained = asyncio.create_task(engine.drain(self._settings.drain_timeout_s))
        cut_short = asyncio.create_task(self._cut_short.wait())
        await asyncio.wait({drained, cut_short}, return_when=asyncio.FIRST_COMPLETED)
        finished = drained.done() and drained.result()
        drained.cancel()
        cut_short.cancel()
        if not finished:
            self._exit_code = 1
            _log.warning("running rows were aborted", extra={"facts": {"running": engine.stats().running}})
            await engine.close()
        self.should_exit = True

    @property
    def _runtime(self) -> Runtime:
        runtime: Runtime = self._app.state.runtime
        return runtime
