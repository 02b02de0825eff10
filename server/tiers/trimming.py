"""TrimSoon: gives freed memory back to the system, shortly after requests freed much, once for all of them.

Owns the moment: after the answer, when neither the request nor an error's traceback holds the memory any more. Only the
event loop calls it. Does not know who freed what.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final

from server.engine.memory.heap import trim_heap

DELAY_S: Final = 0.5


class TrimSoon:
    """One per server."""

    def __init__(self, trim: Callable[[], None] = trim_heap, delay_s: float = DELAY_S) -> None:
        self._trim, self._delay_s = trim, delay_s
        self._is_due = False

    def __call__(self) -> None:
        """Trim in ``delay_s`` seconds, in a thread. Calls until then share that trim."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(self._delay_s, self._begin)

    def _begin(self) -> None:
        self._is_due = False
        threading.Thread(target=self._trim, name="trim-heap", daemon=True).start()
