"""The trainer's process: its sockets, its workers, its signals, its exit code.

On the first SIGTERM or SIGINT the process takes no new work. Its jobs write a checkpoint and are handed back, and it
exits with 0. A second signal, or the drain's time-out, kills them; they resume from an older checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time

import uvicorn

from server.web.binding import bind, bind_admin, url_of
from server.web.intake import Intake
from server.web.listening import SAME_SIGNAL_S, Listener, configured
from trainer.jobs.errors import JobStoreUnavailable
from trainer.jobs.lease import Lease
from trainer.service.app import create_admin, create_public
from trainer.service.assembly import AssembledTrainer, assemble
from trainer.service.settings import TrainerSettings

_log = logging.getLogger("prefixd.trainer")


def run(settings: TrainerSettings) -> int:
    """Serve and work until a signal; return the exit code. Raises CannotListen and what ``assemble`` raises."""
    with contextlib.ExitStack() as sockets:
        admin = [sockets.enter_context(sock) for sock in bind_admin(settings.admin_host, settings.admin_port)]
        public = sockets.enter_context(bind(settings.host, settings.port)) if settings.api else None
        with asyncio.Runner() as runner:
            code = runner.run(_Process(settings, public, admin).run_to_end())
    gc.freeze()  # the interpreter's last collection would go through all of torch
    return code


class _Process:
    def __init__(self, settings: TrainerSettings, public: socket.socket | None, admin: list[socket.socket]) -> None:
        self._settings = settings
        self._intake = Intake(settings.body_timeout_s, settings.max_unfinished_bytes)
        self._sockets = (public, admin)
        self._signalled = asyncio.Event()
        self._cut_short = asyncio.Event()
        self._signalled_at = 0.0

    async def run_to_end(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        made = await assemble(self._settings)
        try:
            return await self._serve(made)
        finally:
            await made.close()

    async def _serve(self, made: AssembledTrainer) -> int:
        public, admin = self._sockets
        serving: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []
        for sockets, create in ((admin, create_admin), ([public] if public else [], create_public)):
            if sockets:
                config = configured(create(made.runtime, self._intake), self._settings, lifespan=False)
                listener = Listener(config, self._intake)
                serving.append((listener, asyncio.create_task(listener.serve(sockets=sockets))))
        while not all(listener.started or task.done() for listener, task in serving):
            await asyncio.sleep(0.001)
        working = asyncio.create_task(self._work(made))
        looking = asyncio.create_task(self._look_after(made))
        shown = {"url": url_of(public), "port": public.getsockname()[1]} if public else {}
        facts = {**shown, "admin_url": url_of(admin[0]), "workers": self._settings.workers}
        _log.info("ready", extra={"facts": facts})

        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait({signalled, working, *(task for _, task in serving)}, return_when=asyncio.FIRST_COMPLETED)
        if not self._signalled.is_set():
            _log.error("a part of the process has ended", exc_info=working.exception() if working.done() else None)
        made.runtime.draining = self._intake.draining = True
        code = await self._drain(working)
        looking.cancel()
        for server, _ in reversed(serving):
            server.should_exit = True
        await asyncio.gather(*(task for _, task in serving), return_exceptions=True)
        _log.info("stopped", extra={"facts": {"exit_code": code}})
        return code if self._signalled.is_set() else 1

    async def _work(self, made: AssembledTrainer) -> None:
        if self._settings.workers:
            await made.worker.queue.work(made.worker.handle, self._settings.workers)
        else:
            await asyncio.Event().wait()

    async def _look_after(self, made: AssembledTrainer) -> None:
        """Count the open jobs and deliver lost ones again, at every ``Lease.look_s``; go on if the store is away.

        If the store was away for ``Lease.absence_s``, or this process was suspended, no worker counts as lost for one
        lease: live workers could not send heartbeats and need time for them.
        """
        worker, lease = made.worker, Lease(self._settings.lease_s)
        seen = judging = time.monotonic()
        while True:
            try:
                await worker.store.check()
                if (now := time.monotonic()) - seen > lease.absence_s:
                    _log.info("jobs are there again", extra={"facts": {"away_s": round(now - seen, 1)}})
                    judging = now + lease.seconds
                found = await (worker.reconcile() if now >= judging else worker.store.open_jobs())
                made.waiting.see(found)
                seen = time.monotonic()
            except JobStoreUnavailable as error:
                _log.warning("jobs unavailable", extra={"facts": {"error": error.message}})
            except Exception:
                _log.exception("unexpected error")
            await asyncio.sleep(lease.look_s)

    async def _drain(self, working: asyncio.Task[None]) -> int:
        working.cancel()
        cut_short = asyncio.create_task(self._cut_short.wait())
        await asyncio.wait(
            {working, cut_short}, timeout=self._settings.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        cut_short.cancel()
        if working.done():
            return 0
        _log.warning("jobs were killed")
        return 1

    def _on_signal(self, name: str) -> None:
        if not self._signalled.is_set():
            _log.info("draining", extra={"facts": {"signal": name, "timeout_s": self._settings.drain_timeout_s}})
            self._signalled_at = time.monotonic()
            self._signalled.set()
        elif time.monotonic() - self._signalled_at >= SAME_SIGNAL_S:
            _log.warning("aborting", extra={"facts": {"signal": name}})
            self._cut_short.set()
