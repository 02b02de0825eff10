"""Waking those who watch a job, within one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Watch:
    """One who watches. What happened since the last wait ends the next one at once: nothing falls between the two."""

    def __init__(self) -> None:
        self._happened = asyncio.Event()

    def wake(self) -> None:
        """Something happened."""
        self._happened.set()

    async def wait(self, timeout_s: float) -> None:
        """Return when something has happened, or after ``timeout_s`` seconds; perhaps for nothing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._happened.wait()
        self._happened.clear()


class Signals:
    """``send`` wakes every watch of the same name."""

    def __init__(self) -> None:
        self._watches: dict[str, set[Watch]] = {}

    def send(self, name: str) -> None:
        """Wake those who watch ``name``."""
        for watch in self._watches.get(name, ()):
            watch.wake()

    def send_all(self) -> None:
        """Wake everybody: something may have been missed."""
        for name in self._watches:
            self.send(name)

    @contextlib.contextmanager
    def watch(self, name: str) -> Iterator[Watch]:
        """Watch ``name`` until the block ends."""
        watch = Watch()
        self._watches.setdefault(name, set()).add(watch)
        try:
            yield watch
        finally:
            watches = self._watches[name]
            watches.discard(watch)
            if not watches:
                del self._watches[name]
