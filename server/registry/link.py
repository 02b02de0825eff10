"""The registry as the server sees it: whether it is there, since when it is not, and who may ask it.

Owns the probe that tells, a thread; the announcements of changes, where the registry has them; and the counts of what
was asked. While the registry is known to be away nobody waits for it: whoever asks gets RegistryUnavailable at once.
Knows no tasks, no HTTP and no event loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, ParamSpec, Protocol, TypeVar

from prefixes.errors import PrefixdError, RegistryUnavailable, WrongRegistry
from prefixes.registry.base import Store, Subscription

PROBE_S: Final = 0.5
SILENT_S: Final = 3.0
"""A probe that has not come back by now, from a file system that hangs for example, says that the registry is away."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger("prefixd.registry")


class LinkObserver(Protocol):
    """Told of every call, and of probes that failed, as ``check``; the others would outnumber the calls."""

    def on_registry_call(self, operation: str, seconds: float, failed: bool) -> None:
        """``failed``: the registry could not do it; an answer such as "no such task" is no failure."""


@dataclass(frozen=True)
class LinkState:
    """For metrics: ``wrong`` is a registry that answers, but is another or was emptied."""

    up: bool
    age_s: float
    wrong: bool
    subscribed: bool


class RegistryLink:
    """One registry, which has just been opened and checked. Thread-safe."""

    def __init__(self, registry: Store, observer: LinkObserver | None = None) -> None:
        self.registry = registry
        self._observer = observer
        self._answered_at = time.monotonic()  # the beginning of the last probe that went well
        self._error: RegistryUnavailable | None = None
        self._subscription: Subscription | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, on_change: Callable[[str, str], None]) -> None:
        """Begin to probe, and to call ``on_change(tenant, name)`` from a thread where changes are announced."""
        self._answered_at = time.monotonic()  # it did while the server was put together; now it is asked again at once
        self._subscription = self.registry.subscribe(on_change)
        self._thread = threading.Thread(target=self._probe_for_ever, name="registry-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; the registry stays open."""
        self._closed.set()
        self._wake.set()
        if self._subscription:
            self._subscription.close()
        if self._thread:
            self._thread.join(timeout=SILENT_S)

    # --- is it there ---

    @property
    def age_s(self) -> float:
        """Seconds since the registry last answered as itself."""
        return time.monotonic() - self._answered_at

    @property
    def up(self) -> bool:
        """Whether it answered the last probe."""
        return self._error is None and self.age_s < SILENT_S

    def require_up(self) -> None:
        """Raise RegistryUnavailable while the registry is known to be away."""
        error = self._error
        if error is not None:
            raise type(error)(error.message)
        if not self.up:
            raise RegistryUnavailable("registry: it does not answer")

    def state(self) -> LinkState:
        """As it is now."""
        wrong = isinstance(self._error, WrongRegistry)
        return LinkState(self.up, max(0.0, self.age_s), wrong, self.is_announcing(self.generation))

    # --- changes ---

    @property
    def generation(self) -> int:
        """Goes up whenever announcements may have been lost. 0: there are none, look for yourself."""
        return self._subscription.generation if self._subscription else 0

    def is_announcing(self, generation: int) -> bool:
        """Whether every change since ``generation`` has been announced, but for those of the last half second.

        A registry that is away, or is another one, announces nothing, whatever its place still says.
        """
        subscription = self._subscription
        return self.up and subscription is not None and subscription.live() and generation == subscription.generation

    def announced_until(self, generation: int) -> float | None:
        """Up to when, in time.monotonic() seconds, no change since ``generation`` can have gone unannounced, or None.

        Never later than the registry's last answer as itself: an emptied one goes on to announce that nothing happens.
        """
        if self._subscription is None or generation == 0:
            return None
        heard_at = self._subscription.heard_at  # before the generation, which goes up first
        return min(heard_at, self._answered_at) if generation == self._subscription.generation else None

    # --- asking ---

    def call(self, operation: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """``function``, a call of the registry, unless that is known to be away. Counted and timed."""
        self.require_up()
        began, failed = time.monotonic(), True
        try:
            result = function(*args, **kwargs)
            failed = False
            return result
        except RegistryUnavailable:
            self._wake.set()  # perhaps it is away: see at once
            raise
        except PrefixdError:
            failed = False
            raise
        finally:
            if self._observer:
                self._observer.on_registry_call(operation, time.monotonic() - began, failed)

    def _probe_for_ever(self) -> None:
        while not self._closed.is_set():
            self._probe()
            if self._wake.wait(PROBE_S):
                self._wake.clear()
                self._closed.wait(PROBE_S / 10)  # a storm of failures is no storm of probes

    def _probe(self) -> None:
        began, before = time.monotonic(), self._error
        try:
            self.registry.check()
        except RegistryUnavailable as error:
            self._error = error
        except Exception as error:  # whatever it is, the server goes on with what it knows
            _log.exception("the registry's probe failed")
            self._error = RegistryUnavailable(f"registry: {type(error).__name__}")
        else:
            self._answered_at, self._error = began, None
        if self._error is not None and self._observer:
            self._observer.on_registry_call("check", time.monotonic() - began, True)
        if before is None and self._error is not None:
            cause = self._error.__cause__
            facts = {"reason": self._error.message, "cause": str(cause)[:200] if cause else None}
            _log.error("the registry is away", extra={"facts": facts})
        elif before is not None and self._error is None:
            _log.info("the registry is back")
