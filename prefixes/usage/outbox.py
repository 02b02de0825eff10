"""Outbox: takes batches of usage to their store from a thread, each until it is known to be there.

Owns the thread, the order of batches, and what waits while the store is away. A batch whose outcome is unknown goes
again under its number, before any later one. Knows nothing of what is counted: ``collect`` gives the next batches.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from prefixes.errors import PrefixdError
from prefixes.usage.model import Batch
from prefixes.usage.store import UsageStore

CLOSE_S: Final = 10.0
"""Seconds that ``close`` waits for the last batches."""

_log = logging.getLogger("prefixd.usage")


class Outbox:
    """Sends every ``every_s`` seconds, and at once when woken. ``collect`` is asked when nothing waits any more."""

    def __init__(self, store: UsageStore, collect: Callable[[], Iterable[Batch]], every_s: float) -> None:
        self._store, self._collect, self._every_s = store, collect, every_s
        self._due: deque[Batch] = deque()  # of the sending thread alone
        self._sending = threading.Lock()
        self._wake, self._closing = threading.Event(), False
        self._away = False
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        """Send from now on."""
        self._thread.start()

    @property
    def up(self) -> bool:
        """Whether the store took what it was last sent."""
        return not self._away

    def wake(self) -> None:
        """Send soon."""
        self._wake.set()

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Send what is left, and stop. False, and a line in the log, where that took too long or failed."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        sent = not (self._thread.is_alive() or self._due)
        if not sent:
            _log.error("usage could not be recorded and is lost", extra={"facts": {"batches": len(self._due)}})
        return sent

    def flush(self) -> bool:
        """Send all there is; False where the store is away. Raises nothing."""
        with self._sending:
            try:
                while self._due or self._take():
                    self._store.add(self._due[0])
                    self._due.popleft()
            except PrefixdError as error:
                self._told(error.message)
            except Exception as error:  # the batch stays, and goes again
                _log.exception("sending usage failed")
                self._told(type(error).__name__)
            else:
                self._away = False
            return not self._due

    def _take(self) -> bool:
        self._due.extend(self._collect())
        return bool(self._due)

    def _told(self, reason: str) -> None:
        if not self._away:
            _log.warning("usage cannot be recorded yet", extra={"facts": {"reason": reason}})
        self._away = True

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._every_s)
            self._wake.clear()
            self.flush()
        self.flush()
