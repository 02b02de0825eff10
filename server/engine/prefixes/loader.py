"""Loads prefixes off the engine's thread: a queue, a few threads, and a bound on what waits for blocks.

Owns which loads are queued, running and ended. Owners of prefixes take turns, each in the order of asking: whoever has
a thousand waits for itself. A prefix that is loaded but not yet in blocks is *staged*. No ledger counts the host memory
that it takes, so no further load begins while staged prefixes hold ``max_staged_bytes`` or more. Knows neither blocks
nor rows; the store says what is still wanted.

The bound cannot deadlock: as earlier rows end, every group that staged prefixes are for is admitted, fails or gives up,
and each of these drops its prefix here. Pins that nobody waits for might never find room. They have a bound of their
own, so that they cannot keep rows from loading.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prefixes.errors import EngineFailure, PrefixdError
from server.engine.memory.heap import trim_heap
from server.engine.observer import EngineObserver
from server.engine.types import PrefixKey

if TYPE_CHECKING:
    from prefixes.artifact import Prefix

log = logging.getLogger(__name__)

LINGER_S: Final = 5.0
"""Seconds that a thread without work stays: starting one delays the engine's thread, an idle one keeps it in memory."""


@dataclass
class _Load:
    urgent: bool  # rows wait for it; otherwise only a pin wants it
    number: int  # in the order of asking
    outcome: Prefix | PrefixdError | None = None
    nbytes: int = 0  # staged


class _Queue:
    """Loads that have not begun, a lane for each owner. The first lane's first load is the next."""

    def __init__(self) -> None:
        self._lanes: dict[str, dict[PrefixKey, _Load]] = {}  # none is empty

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    @property
    def first(self) -> tuple[PrefixKey, _Load] | None:
        """The load to begin next."""
        return next((next(iter(lane.items())) for lane in self._lanes.values()), None)

    def add(self, key: PrefixKey, load: _Load) -> None:
        """Add a load to its owner's lane, at its place in the order of asking."""
        lane = self._lanes.setdefault(key.tenant, {})
        later = lane and next(reversed(lane.values())).number > load.number
        lane[key] = load
        if later:
            self._lanes[key.tenant] = dict(sorted(lane.items(), key=lambda item: item[1].number))

    def remove(self, key: PrefixKey) -> _Load | None:
        """Take a load out, if it is here; its owner keeps its turn."""
        lane = self._lanes.get(key.tenant, {})
        load = lane.pop(key, None)
        if load and not lane:
            del self._lanes[key.tenant]
        return load

    def begin(self, key: PrefixKey) -> None:
        """Take out a load that begins: its owner's next turn is behind the others'."""
        self.remove(key)
        if lane := self._lanes.pop(key.tenant, None):
            self._lanes[key.tenant] = lane

    def clear(self) -> None:
        """Forget all."""
        self._lanes.clear()


class PrefixLoader:
    """The engine's thread alone calls it, except ``staged_bytes``. ``load`` and ``wake`` run in its own threads.

    These are daemons: neither ``close`` nor the process's exit waits for a hung load.
    """

    def __init__(
        self,
        load: Callable[[PrefixKey], Prefix],
        *,
        workers: int,
        max_staged_bytes: int,
        observer: EngineObserver,
        wake: Callable[[], None],
    ) -> None:
        self._load, self._workers, self._max_staged_bytes = load, workers, max_staged_bytes
        self._observer, self._wake = observer, wake
        self._asked: dict[PrefixKey, _Load] = {}
        # By urgency: loads that have not begun, and the bytes that loaded ones hold.
        self._queued = {True: _Queue(), False: _Queue()}
        self._staged = {True: 0, False: 0}
        self._ended: list[PrefixKey] = []  # loads that ended since ``take_ended`` was last called
        self._number = 0
        self._running: set[PrefixKey] = set()  # also those that nobody wants any more
        self._threads = 0
        self._closed = False
        self._lock = threading.Condition()

    def ask(self, key: PrefixKey, *, urgent: bool) -> None:
        """Queue ``key``. If it is already asked for, only its ``urgent`` changes.

        A load that still runs from an earlier, dropped asking is taken over, not begun a second time.
        """
        with self._lock:
            known = self._asked.get(key)
            if known is None:
                self._number += 1
                self._asked[key] = asked = _Load(urgent, self._number)
                if key not in self._running:
                    self._queued[urgent].add(key, asked)
            elif known.urgent is not urgent:
                self._change_urgency(key, known)
            self._begin_what_may()

    @property
    def has_ended(self) -> bool:
        """Whether ``take_ended`` would give anything."""
        return bool(self._ended)

    def take_ended(self) -> list[PrefixKey]:
        """The keys whose loads have ended since the last call; some may have been dropped since."""
        with self._lock:
            ended, self._ended = self._ended, []
            return ended

    def outcome(self, key: PrefixKey) -> Prefix | PrefixdError | None:
        """The prefix or the error of an asked key; None while it is queued or being loaded."""
        with self._lock:
            return self._asked[key].outcome

    def drop(self, key: PrefixKey) -> None:
        """Forget ``key``: it is in blocks, has failed, or nobody wants it. Others may load in its place."""
        with self._lock:
            if load := self._asked.pop(key, None):
                self._queued[load.urgent].remove(key)
                self._staged[load.urgent] -= load.nbytes
            self._begin_what_may()

    @property
    def staged_bytes(self) -> int:
        """Bytes of prefixes that are loaded and not in blocks."""
        return sum(self._staged.values())

    def close(self) -> None:
        """Begin no more loads, and abandon those that run."""
        with self._lock:
            self._closed = True
            for queued in self._queued.values():
                queued.clear()
            self._lock.notify_all()

    # --- inside, under the lock ---

    def _next(self) -> PrefixKey | None:
        """The key to load next: the one asked for earlier, of the kinds (urgent or not) that have room."""
        heads = [
            queued.first
            for urgent, queued in self._queued.items()
            if queued.first and self._staged[urgent] < self._max_staged_bytes
        ]
        return min(heads, key=lambda head: head[1].number)[0] if heads else None

    def _startable(self) -> int:
        """How many loads may begin now."""
        room = [urgent for urgent in (True, False) if self._staged[urgent] < self._max_staged_bytes]
        return sum(len(self._queued[urgent]) for urgent in room)

    def _change_urgency(self, key: PrefixKey, load: _Load) -> None:
        """Move a load to the other kind, to its place in the order of asking."""
        self._staged[load.urgent] -= load.nbytes
        queued = self._queued[load.urgent].remove(key)
        load.urgent = not load.urgent
        self._staged[load.urgent] += load.nbytes
        if queued:
            self._queued[load.urgent].add(key, load)

    def _begin_what_may(self) -> None:
        wanted = min(self._startable(), self._workers)
        self._lock.notify_all()
        while self._threads < self._workers and self._threads - len(self._running) < wanted:
            try:
                threading.Thread(target=self._work, name="prefix-load", daemon=True).start()
            except RuntimeError as error:  # no thread can be started
                if self._threads == 0:
                    self._fail_startable(EngineFailure(f"prefix: loading failed: {error}"))
                return
            self._threads += 1

    def _fail_startable(self, error: PrefixdError) -> None:
        for _ in range(self._workers):
            if (key := self._next()) is not None:
                self._asked[key].outcome = error
                self._queued[self._asked[key].urgent].begin(key)
                self._ended.append(key)

    # --- in threads of its own ---

    def _work(self) -> None:
        while (key := self._take()) is not None:
            outcome, nbytes = self._timed(key)
            with self._lock:
                self._running.discard(key)
                if load := self._asked.get(key):
                    load.outcome, load.nbytes = outcome, nbytes
                    self._staged[load.urgent] += nbytes
                    self._ended.append(key)
                self._begin_what_may()
            self._wake()
            del outcome  # it is the store's now: an idle thread must not keep it
        trim_heap()

    def _take(self) -> PrefixKey | None:
        """The next key to load; None if this thread should end."""
        with self._lock:
            while not self._closed:
                if (key := self._next()) is not None:
                    self._queued[self._asked[key].urgent].begin(key)
                    self._running.add(key)
                    return key
                if not self._lock.wait(LINGER_S) and not self._startable():
                    break
            self._threads -= 1
            return None

    def _timed(self, key: PrefixKey) -> tuple[Prefix | PrefixdError, int]:
        began, nbytes = time.monotonic(), 0
        outcome: Prefix | PrefixdError
        try:
            outcome = self._load(key)
            nbytes = sum(tensor.nbytes for tensor in outcome.tensors.values())
        except PrefixdError as error:
            outcome = error
        except BaseException as error:
            facts = {"tenant": key.tenant, "version": key.version}
            log.exception("a prefix could not be loaded", extra={"facts": facts})  # clients see only its type
            outcome = EngineFailure(f"prefix: loading failed with {type(error).__name__}")
        self._observer.on_prefix_load(time.monotonic() - began, nbytes, not isinstance(outcome, PrefixdError))
        return outcome, nbytes
