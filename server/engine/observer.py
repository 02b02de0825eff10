"""What the engine reports while it works: the Protocol, the silent default, and a guard. Knows no metrics library."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import ParamSpec, Protocol

from server.engine.types import FinishReason, Usage

log = logging.getLogger(__name__)

_P = ParamSpec("_P")


class EngineObserver(Protocol):
    """Called from the engine's threads; must be quick. Times are in seconds."""

    def on_step(self, rows: int, tasks: int, tokens: int, seconds: float, forwards: Mapping[str, int]) -> None:
        """One step ran: rows and distinct tasks in it (the bare backbone counts as one), tokens, calls per stage.

        An input that goes through the encoder counts as a row with all its tokens, in every step that it takes.
        """

    def on_first_token(self, task: str | None, seconds: float) -> None:
        """A request's first token came ``seconds`` after it was submitted."""

    def on_inter_token(self, task: str | None, seconds: float) -> None:
        """A further token of an output came ``seconds`` after the one before."""

    def on_finish(
        self, task: str | None, caller: str, reason: FinishReason | None, usage: Usage, seconds: float
    ) -> None:
        """A request of the tenant ``caller`` ended; ``reason`` None is an error."""

    def on_prefix_load(self, seconds: float, nbytes: int, ok: bool) -> None:
        """A prefix was fetched and verified, or that failed."""

    def on_prefix_evicted(self, nbytes: int) -> None:
        """An idle prefix gave up its blocks."""

    def on_preemption(self) -> None:
        """A running group gave up its blocks and waits to be recomputed."""


class SilentObserver:
    """Observes nothing: the default, and a base for observers that need only some of the reports."""

    def on_step(self, rows: int, tasks: int, tokens: int, seconds: float, forwards: Mapping[str, int]) -> None: ...

    def on_first_token(self, task: str | None, seconds: float) -> None: ...

    def on_inter_token(self, task: str | None, seconds: float) -> None: ...

    def on_finish(
        self, task: str | None, caller: str, reason: FinishReason | None, usage: Usage, seconds: float
    ) -> None: ...

    def on_prefix_load(self, seconds: float, nbytes: int, ok: bool) -> None: ...

    def on_prefix_evicted(self, nbytes: int) -> None: ...

    def on_preemption(self) -> None: ...


class GuardedObserver:
    """Passes every report on. One that cannot be taken is logged and lost: no request suffers for it."""

    def __init__(self, observer: EngineObserver) -> None:
        self.on_step = _guarded(observer.on_step)
        self.on_first_token = _guarded(observer.on_first_token)
        self.on_inter_token = _guarded(observer.on_inter_token)
        self.on_finish = _guarded(observer.on_finish)
        self.on_prefix_load = _guarded(observer.on_prefix_load)
        self.on_prefix_evicted = _guarded(observer.on_prefix_evicted)
        self.on_preemption = _guarded(observer.on_preemption)


def _guarded(report: Callable[_P, None]) -> Callable[_P, None]:
    def guarded(*arguments: _P.args, **named: _P.kwargs) -> None:
        try:
            report(*arguments, **named)
        except Exception:
            log.exception("a report of the engine was not taken")

    return guarded
