"""The server's process: its sockets, its signals, its drain, its exit code.

Owns uvicorn, which runs the public and the admin application on one event loop. On the first SIGTERM or SIGINT nothing
new is admitted and running rows finish. Both ports stay open meanwhile, so that ``/ready`` and every refused request
get a proper answer. Then the process exits with 0. A second signal, or the drain timeout, aborts what still runs, and
the exit code is 1. The admin port closes last. Knows no route.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import uvicorn

from server.settings import Settings
from server.web.binding import CannotListen, bind_admin, url_of
from server.web.binding import bind as bind_socket
from server.web.listening import SAME_SIGNAL_S, Listener, configured

if TYPE_CHECKING:  # a taken port fails before torch is imported

    from server.app import Applications
    from server.runtime import Runtime

_log = logging.getLogger("prefixd.server")


@dataclass(frozen=True)
class Sockets:
    """Those of both ports, bound and not yet listening."""

    public: socket.socket
    admin: list[socket.socket]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for sock in (self.public, *self.admin):
            sock.close()


def bind(settings: Settings) -> Sockets:
    """The sockets to serve on. Raises CannotListen before minutes go into loading."""
    public = bind_socket(settings.host, settings.port)
    try:
        return Sockets(public, bind_admin(settings.admin_host, settings.admin_port))
    except CannotListen:
        public.close()
        raise


def serve(apps: Applications, sockets: Sockets, settings: Settings) -> int:
    """Serve both applications until a signal. Returns the process's exit code."""
    config = configured(apps.public, settings, lifespan=True)
    server = _Server(config, apps, sockets, settings)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        code = runner.run(server.run_to_end())
    gc.freeze()  # the interpreter's last collection would go through all of torch, for seconds on a busy machine
    return code


class _Server(Listener):
    """The public listener. It starts and stops the admin listener with itself."""

    def __init__(self, config: uvicorn.Config, apps: Applications, sockets: Sockets, settings: Settings) -> None:
        super().__init__(config, apps.intake)
        self._app, self._sockets, self._settings = apps.public, sockets, settings
        self._admin = Listener(configured(apps.admin, settings, lifespan=False), apps.intake)
        self._admin_serving: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._drain_began = 0.0
        self._cut_short = asyncio.Event()
        self._exit_code = 0

    async def run_to_end(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        await self.serve(sockets=[self._sockets.public])
        if self._admin_serving:
            self._admin.should_exit = True
            await self._admin_serving
        _log.info("stopped", extra={"facts": {"exit_code": self._exit_code}})
        return self._exit_code

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then the admin listener, which needs what the lifespan made. Log both addresses."""
        await super().startup(sockets)
        self._admin_serving = asyncio.create_task(self._admin.serve(sockets=self._sockets.admin))
        while not (self._admin.started or self._admin_serving.done()):
            await asyncio.sleep(0.001)
        public, admin = self._sockets.public, self._sockets.admin[0]
        _log.info("ready", extra={"facts": {
            "url": url_of(public), "port": public.getsockname()[1], "admin_url": url_of(admin),
            "backbone": self._settings.backbone}})

    def _on_signal(self, name: str) -> None:
        if not self.started:
            self.should_exit = True
        elif self._draining is None:
            _log.info("draining", extra={"facts": {"signal": name, "timeout_s": self._settings.drain_timeout_s}})
            self._drain_began = time.monotonic()
            self._intake.draining = True
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
