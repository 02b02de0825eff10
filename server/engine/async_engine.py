"""asyncio <-> the engine's thread.

Owns the thread, the inbox and the event streams; knows no HTTP. The event loop submits and aborts; the thread steps the
engine and hands each step's events back to the loop in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final

from prefixes.errors import EngineFailure, NotReady, PrefixdError, ShuttingDown
from prefixes.spec import PrefixSpec
from server.engine.engine import Engine
from server.engine.inflow import Inflow
from server.engine.step_watch import StepWatch
from server.engine.types import EngineStats, Event, Failed, Finished, GenerationRequest, PrefixKey, TokenEvent

STEP_TIMEOUT_S: Final = 60.0
"""Seconds after which a step counts as hung, by default."""
CLOSE_S: Final = 10.0
"""Seconds that ``close`` waits for the step under way, before it leaves the thread behind."""

OnEnd = Callable[[Finished | Failed], None]
OnAnyEnd = Callable[[GenerationRequest, Finished | Failed], None]

log = logging.getLogger(__name__)


class EventStream(AsyncIterator[Event]):
    """One request's events, ending with exactly one terminal event. A reader that leaves early must call ``abort``.

    Each ``on_end`` is called once with the terminal event, on the event loop, whether anybody reads or not.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None], *on_end: OnEnd) -> None:
        self.request_id = request_id
        self._abort, self._on_end = abort, on_end
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = False

    def push(self, event: Event) -> None:
        """Called on the event loop."""
        self._events.put_nowait(event)
        if isinstance(event, TokenEvent):
            return
        for on_end in self._on_end:
            try:
                on_end(event)
            except Exception:  # the request has its answer all the same
                log.exception("the end of a request was not taken", extra={"facts": {"request_id": self.request_id}})

    def take_ready(self) -> list[Event]:
        """Further events that are already here, without waiting, so that a caller can write several at once."""
        ready = []
        while not self._events.empty() and not self._ended:
            ready.append(self._note(self._events.get_nowait()))
        return ready

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        return self._note(await self._events.get())

    def abort(self) -> None:
        """End the request; idempotent, and the stream still ends with its terminal event."""
        if not self._ended:
            self._abort(self.request_id)

    async def result(self) -> Finished:
        """Wait for the end. Raises the error of a failed request; aborts if cancelled."""
        try:
            async for event in self:
                if isinstance(event, Finished):
                    return event
                if isinstance(event, Failed):
                    raise event.error
        finally:
            self.abort()
        raise EngineFailure("the stream ended without a terminal event")

    def _note(self, event: Event) -> Event:
        self._ended = isinstance(event, Finished | Failed)
        return event


class AsyncEngine:
    """Runs an engine in its own thread."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        inflow: Inflow,
        watch: StepWatch,
        on_end: OnAnyEnd | None,
    ) -> None:
        self._engine, self._loop, self._inflow, self._watch, self._on_end = engine, loop, inflow, watch, on_end
        self._streams: dict[str, EventStream] = {}
        self._inbox: deque[Callable[[], list[Event]]] = deque()
        self._wakeup = threading.Condition()
        self._draining = self._closing = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @classmethod
    def start(
        cls, engine: Engine, inflow: Inflow, watch: StepWatch | None = None, on_end: OnAnyEnd | None = None
    ) -> AsyncEngine:
        """Start stepping ``engine``; call on the event loop that will use it. ``inflow`` says how many may wait.

        ``on_end`` is told of every request's end, as that of ``submit`` is of one.
        """
        started = cls(engine, asyncio.get_running_loop(), inflow, watch or StepWatch(STEP_TIMEOUT_S), on_end)
        engine.on_wake(started._notify)
        started._thread.start()
        return started

    # --- called on the event loop ---

    def submit(self, request: GenerationRequest, on_end: OnEnd | None = None) -> EventStream:
        """Queue ``request``. ``on_end`` is told of its end if this returns.

        Raises QueueFull, ShuttingDown, InputTooLong, InvalidParameter, NotReady while a step hangs, or EngineFailure
        if the engine has stopped or the request's id is in use.
        """
        if self._draining or self._closing:
            raise ShuttingDown("the server is shutting down and takes no new work", retry_after_s=5)
        if not self.healthy:
            raise EngineFailure("the engine has stopped")
        self._watch.check()
        self._engine.check(request)  # first: what can never run is not worth trying again
        self._inflow.check(request, self._engine.waiting)
        told = [] if self._on_end is None else [partial(self._on_end, request)]
        stream = EventStream(request.request_id, self._submit_abort, *told, *([on_end] if on_end else []))
        if request.request_id in self._streams:
            raise EngineFailure(f"request id {request.request_id!r} is already in use")
        self._streams[request.request_id] = stream
        self._inflow.submitted(request)
        submitted_at = time.monotonic()
        self._post(lambda: self._add(request, submitted_at))
        return stream

    def check_prefix(self, spec: PrefixSpec, shortest: tuple[int, ...]) -> None:
        """As ``Engine.check_prefix``."""
        self._engine.check_prefix(spec, shortest)

    def stats(self) -> EngineStats:
        """A snapshot for gauges."""
        return self._engine.stats()

    def residents(self) -> frozenset[PrefixKey]:
        """Prefixes in blocks now."""
        return self._engine.residents()

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is alive and stepping."""
        return self._thread.is_alive() and not self._failed

    @property
    def step_running_s(self) -> float:
        """How long the step under way has run; 0 between two steps."""
        return self._watch.running_s

    def check_alive(self) -> None:
        """Raise NotReady if the engine has stopped, or while a step hangs."""
        if not self.healthy:
            raise NotReady("the engine has stopped")
        self._watch.check()

    @property
    def draining(self) -> bool:
        return self._draining

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no new work and wait until all requests and the step under way have ended.

        False if ``timeout_s`` passed first, a step hangs, or the engine has stopped.
        """
        self._draining = True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (self._streams or self._watch.busy) and self.healthy:
            if self._watch.hung or (deadline is not None and time.monotonic() > deadline):
                return False
            await asyncio.sleep(0.02)
        return self.healthy

    async def close(self, patience_s: float = CLOSE_S) -> None:
        """Abort what is left and stop the thread. A step that does not return within ``patience_s`` is left behind."""
        self._draining = True
        for request_id in list(self._streams):
            self._submit_abort(request_id)
        self._closing = True
        self._notify()
        await asyncio.to_thread(self._thread.join, 0 if self._failed else patience_s)
        if self._thread.is_alive() and not self._failed:
            log.error("the engine's step does not return; its requests end with an error")
            self._failed = True
            self._fail_all()
        self._engine.close()
        await asyncio.sleep(0)  # deliver the thread's last events

    def _submit_abort(self, request_id: str) -> None:
        self._post(lambda: self._engine.abort(request_id))

    def _post(self, action: Callable[[], list[Event]]) -> None:
        self._inbox.append(action)
        self._notify()

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            if isinstance(event, Finished | Failed):
                del self._streams[event.request_id]
            stream.push(event)

    def _fail_all(self) -> None:
        """The thread has stopped or is left: fail every open request, also those from before ``healthy`` was False."""
        failure = EngineFailure("the engine has stopped")
        self._deliver([Failed(request_id, failure) for request_id in self._streams])

    # --- called on the engine's thread ---

    def _add(self, request: GenerationRequest, submitted_at: float) -> list[Event]:
        self._inflow.taken(request)
        try:
            self._engine.add(request, submitted_at)
        except PrefixdError as error:
            return [Failed(request.request_id, error)]
        except Exception as error:
            log.exception("a request could not be added", extra={"facts": {"request_id": request.request_id}})
            return [Failed(request.request_id, EngineFailure.unexpected(error))]
        return []

    def _run(self) -> None:
        try:
            while not (self._closing and not self._inbox):
                with self._watch:
                    self._hand_over(self._take_inbox())
                    if self._engine.has_work:
                        self._hand_over(self._engine.step())
                self._sleep_if_idle()
        except BaseException as error:
            log.exception("the engine's thread stopped")
            self._failed = True
            with contextlib.suppress(Exception):  # these know what they took; all others end without
                self._hand_over(self._engine.end_all(error))
            self._on_loop(self._fail_all)

    def _take_inbox(self) -> list[Event]:
        events: list[Event] = []
        while self._inbox:
            action = self._inbox.popleft()
            try:
                events += action()
            except Exception:  # of one request; the others go on
                log.exception("an action of the event loop failed")
        return events

    def _hand_over(self, events: list[Event]) -> None:
        if events:
            self._on_loop(lambda: self._deliver(events))

    def _on_loop(self, action: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:
            log.warning("the event loop closed before the engine's last events were delivered")

    @property
    def _idle(self) -> bool:
        return not (self._inbox or self._closing or self._engine.has_work)

    def _sleep_if_idle(self) -> None:
        if self._idle and self._engine.requests == 0:
            self._check_integrity()  # outside the lock: the event loop takes it to notify
        with self._wakeup:
            while self._idle:
                self._wakeup.wait()

    def _check_integrity(self) -> None:
        try:
            self._engine.check_integrity()
        except Exception:
            log.exception("the memory ledger is not what its holders say; this is a defect")

    def _notify(self) -> None:
        with self._wakeup:
            self._wakeup.notify()
