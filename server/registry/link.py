"""RegistryLink: whether the registry answers, since when it does not, and its calls.

Owns the probe (a thread that finds out), the announcements of changes if the registry has them, and the counts of
calls. While the registry is known to be away, nobody waits for it: every call raises RegistryUnavailable at once. Knows
no tasks, no HTTP and no event loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, ParamSpec, Protocol, TypeVar

from prefixes.errors import PrefixdError, RegistryUnavailable, WrongRegistry
from prefixes.registry.base import Store
from prefixes.registry.subscription import Subscription

PROBE_S: Final = 0.5
SILENT_S: Final = 3.0
"""The registry is away if no probe that began within this time has succeeded, for example because a disk hangs."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger("prefixd.registry")


class LinkObserver(Protocol):
    """Told of every call, and of each failed probe as ``check``. Successful probes would outnumber the calls."""

    def on_registry_call(self, operation: str, seconds: float, failed: bool) -> None:
        """``failed`` says that the registry could not do it. An answer such as "no such task" is no failure."""


@dataclass(frozen=True)
class LinkState:
    """For metrics. ``wrong`` means that the registry answers but is another one or was emptied."""

    up: bool
    age_s: float
    wrong: bool
    subscribed: bool


class RegistryLink:
    """The link to one registry, which has just been opened and checked. Thread-safe."""

    def __init__(self, registry: Store, observer: LinkObserver | None = None) -> None:
        self.registry = registry
        self._observer = observer
        self._answered_at = time.monotonic()  # the start of the last successful probe
        self._error: RegistryUnavailable | None = None
        self._subscription: Subscription | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, on_change: Callable[[str, str], None]) -> None:
        """Begin to probe. If changes are announced, call ``on_change(tenant, name)`` for each, from a thread."""
        self._answered_at = time.monotonic()  # it answered during the assembly and is probed again at once
        self._subscription = self.registry.subscribe(on_change)
        self._thread = threading.Thread(target=self._probe_for_ever, name="registry-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop probing. The registry stays open."""
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
        """Whether it answered the last probe, and within ``SILENT_S``."""
        return self._error is None and self.age_s < SILENT_S

    def require_up(self) -> None:
        """Raise RegistryUnavailable while the registry is known to be away."""
        error = self._error
        if error is not None:
            raise type(error)(error.message)
        if not self.up:
            raise RegistryUnavailable("registry: it does not answer")

    def state(self) -> LinkState:
        """The state now."""
        wrong = isinstance(self._error, WrongRegistry)
        return LinkState(self.up, max(0.0, self.age_s), wrong, self.is_announcing(self.generation))

    # --- changes ---

    @property
    def generation(self) -> int:
        """Goes up whenever announcements may have been lost. 0 means that there are none, and changes are polled."""
        return self._subscription.generation if self._subscription else 0

    def is_announcing(self, generation: int) -> bool:
        """Whether every change since ``generation`` has been announced, except those of the last half second.

        False for a registry that is away or is another one, even if its connection still answers.
        """
        subscription = self._subscription
        return self.up and subscription is not None and subscription.live() and generation == subscription.generation

    def announced_until(self, generation: int) -> float | None:
        """The time, in time.monotonic() seconds, until which every change since ``generation`` was announced, or None.

        Never later than the registry's last answer as itself, because an emptied registry still answers pings.
        """
        if self._subscription is None or generation == 0:
            return None
        heard_at = self._subscription.heard_at  # read before the generation, which a new connection raises first
        return min(heard_at, self._answered_at) if generation == self._subscription.generation else None

    # --- asking ---

    def call(self, operation: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call ``function``, counted and timed. Raises RegistryUnavailable if the registry is known to be away."""
        self.require_up()
        began, failed = time.monotonic(), True
        try:
            result = function(*args, **kwargs)
            failed = False
            return result
        except RegistryUnavailable:
            self._wake.set()  # it may be away: probe at once
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
                self._closed.wait(PROBE_S / 10)  # so that a storm of failures makes no storm of probes

    def _probe(self) -> None:
        began, before = time.monotonic(), self._error
        try:
            self.registry.check()
        except RegistryUnavailable as error:
            self._error = error
        except Exception as error:  # on any error the server goes on with what it knows
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
