"""Counts the lines of Python that a call runs, to test promises about cost without measuring time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Lines:
    """Counts the lines of Python that a call runs, of whatever module: a loop over tasks cannot hide from it."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, call: Callable[[], object]) -> int:
        """How many lines ``call`` runs in this thread."""
        self.count = 0
        gc.disable()  # what it calls comes at any time
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(before)
            gc.enable()
        return self.count

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        self.count += event == "line"
        return self._trace
