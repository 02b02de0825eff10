"""TrimSoon: freed memory goes back to the system a moment after somebody freed much, once for all who did.

Owns the moment: behind the answer, when nothing of the request, nor an error's traceback, holds the memory any more.
Called from the event loop alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final

from server.engine.memory.heap import trim_heap

DELAY_S: Final = 0.5


class TrimSoon:
    """One of these for a server."""

    def __init__(self, trim: Callable[[], None] = trim_heap, delay_s: float = DELAY_S) -> None:
        self._trim, self._delay_s = trim, delay_s
        self._is_due = False

    def __call__(self) -> None:
        """Trim in ``delay_s`` seconds, in a thread; asked for meanwhile, that is the same one."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(self._delay_s, self._begin)

    def _begin(self) -> None:
        self._is_due = False
        threading.Thread(target=self._trim, name="trim-heap", daemon=True).start()
