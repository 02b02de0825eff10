"""Who was refused, on its way into the registry: at a bounded rate, and never in a request's way.

Owns the notes that a request leaves, the rate, and the thread that writes. Each tenant has a rate of its own, callers
without a known key share one, and what is beyond it is summed up in one record. While the registry is away the records
wait, as many as are kept. Does not decide who is refused.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from prefixes.errors import PrefixdError
from prefixes.tenancy.denial import DENIALS_KEPT, Denial
from prefixes.tenancy.directory import utc_now
from prefixes.tenancy.store import TenancyStore

BURST: Final = 20
"""Denials of a tenant that are written one by one, whatever the time between them."""
PAUSE_S: Final = 6.0
"""After so long it is one more."""
WRITE_S: Final = 1.0
MOST_FAILURES: Final = 3
"""Of tenants at one time: each may take as long as a registry that is away is waited for."""

_log = logging.getLogger("prefixd.keys")


@dataclass(frozen=True)
class Refused:
    """A note of one refusal: what was asked for, the task where the caller may know of it, and why not."""

    action: str
    what: str
    reason: str


_notes: ContextVar[list[Refused] | None] = ContextVar("refused", default=None)


def begin_notes() -> list[Refused]:
    """From now on the request in whose context this is called takes notes, here."""
    notes: list[Refused] = []
    _notes.set(notes)
    return notes


def note_refused(action: str, what: str, reason: str, *, if_none: bool = False) -> None:
    """Note that the request is refused, with ``if_none`` unless that was noted already. Outside of one: nothing."""
    notes = _notes.get()
    if notes is not None and not (if_none and notes):
        notes.append(Refused(action, what, reason))


@dataclass
class _Tenant:
    """One tenant's rate, and what waits to be written."""

    left: float
    counted_at: float
    waiting: list[Denial] = field(default_factory=list)
    beyond: int = 0
    beyond_since: str = ""


class DenialLog:
    """Thread-safe. ``note`` costs a caller next to nothing, whatever the registry does."""

    def __init__(self, store: TenancyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._tenants: dict[str | None, _Tenant] = {}  # tenants that have keys, so as many as a registry has
        self._failed = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, tenant: str | None, make: Callable[[], Denial]) -> None:
        """Keep a denial, or only count it. ``tenant`` None is a caller without a known key."""
        with self._lock:
            kept = self._tenants.setdefault(tenant, _Tenant(BURST, self._clock()))
            if len(kept.waiting) < DENIALS_KEPT and self._takes(kept):
                kept.waiting.append(make())
            else:
                kept.beyond += 1
                kept.beyond_since = kept.beyond_since or utc_now()

    def start(self) -> None:
        """Write again and again from now on."""
        self._thread = threading.Thread(target=self._run, name="denials", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is left, the sums too."""
        self._closing.set()
        if self._thread:
            self._thread.join(timeout=10 * WRITE_S)
        self.write(last=True)

    def write(self, *, last: bool = False) -> None:
        """Write what waits. Raises nothing: what cannot be written waits on, also what comes after MOST_FAILURES."""
        failures = 0
        for tenant, denials in self._taken(last).items():
            try:
                if failures < MOST_FAILURES:
                    self._store.note_denials(tenant, denials)
                    continue
            except Exception as error:  # no fault of this one may end the thread
                if not self._failed:
                    reason = error.message if isinstance(error, PrefixdError) else type(error).__name__
                    _log.warning("denials were not written", extra={"facts": {"reason": reason}})
                failures, self._failed = failures + 1, True
            self._give_back(tenant, denials)
        self._failed = failures > 0

    def _run(self) -> None:
        while not self._closing.wait(WRITE_S):
            self.write()

    def _takes(self, kept: _Tenant) -> bool:
        now = self._clock()
        kept.left = min(float(BURST), kept.left + (now - kept.counted_at) / PAUSE_S)
        kept.counted_at = now
        if kept.left < 1:
            return False
        kept.left -= 1
        return True

    def _taken(self, last: bool) -> dict[str | None, list[Denial]]:
        with self._lock:
            for kept in self._tenants.values():
                if kept.beyond and len(kept.waiting) < DENIALS_KEPT and (last or self._takes(kept)):
                    reason = f"{kept.beyond} more since {kept.beyond_since}, not written one by one"
                    kept.waiting.append(Denial(utc_now(), None, "", "", "", reason, "", kept.beyond))
                    kept.beyond, kept.beyond_since = 0, ""
            taken = {tenant: kept.waiting for tenant, kept in self._tenants.items() if kept.waiting}
            for tenant in taken:
                self._tenants[tenant].waiting = []
            return taken

    def _give_back(self, tenant: str | None, denials: list[Denial]) -> None:
        with self._lock:
            kept = self._tenants[tenant]
            kept.waiting = [*denials, *kept.waiting]
            for lost in kept.waiting[DENIALS_KEPT:]:
                kept.beyond += lost.count
                kept.beyond_since = kept.beyond_since or lost.at
            kept.waiting = kept.waiting[:DENIALS_KEPT]

