"""How long the engine's thread has been at work without coming back: what tells a hung kernel from a busy engine.

Owns one clock reading. The engine's thread writes it, any thread reads it. Knows no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from prefixes.errors import NotReady


class StepWatch:
    """A context manager around each step. A step that has run for more than ``limit_s`` counts as hung."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._began: float | None = None  # None between two steps

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._began = None

    @property
    def running_s(self) -> float:
        """How long the step under way has run; 0 between two steps."""
        began = self._began
        return 0.0 if began is None else self._clock() - began

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return self._began is not None

    @property
    def hung(self) -> bool:
        """Whether the step under way has run for longer than a step may. It may still come back."""
        return self.running_s > self._limit_s

    def check(self) -> None:
        """Raise NotReady while a step hangs."""
        seconds = self.running_s
        if seconds > self._limit_s:
            raise NotReady(
                f"the engine's step has run for {seconds:.0f} s, expected at most {self._limit_s:g} s",
                expected=self._limit_s,
                got=seconds,
            )
