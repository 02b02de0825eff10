"""Wakes the watchers of a job within one event loop. Knows no job and no event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Watch:
    """One watcher. A wake between two waits ends the next wait at once, so none is lost."""

    def __init__(self) -> None:
        self._happened = asyncio.Event()

    def wake(self) -> None:
        """End the present wait, or the next one."""
        self._happened.set()

    async def wait(self, timeout_s: float) -> None:
        """Return after a wake or ``timeout_s`` seconds. A wake may be spurious."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._happened.wait()
        self._happened.clear()


class Signals:
    """The watches of an event loop by name, such as a job's id."""

    def __init__(self) -> None:
        self._watches: dict[str, set[Watch]] = {}

    def send(self, name: str) -> None:
        """Wake every watch of ``name``."""
        for watch in self._watches.get(name, ()):
            watch.wake()

    def send_all(self) -> None:
        """Wake every watch: signals may have been missed."""
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
