"""SharedLimiter: a limiter that replicas share, and what each of them does while it is away: it allows its own share.

Owns the thread that announces this replica and finds out whether the shared limiter answers, how many replicas there
were when it last did, and settlements that it has not got yet. While it is away nobody waits for it. Knows no Redis.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from prefixes.errors import RegistryUnavailable
from prefixes.limiter.base import Charge, Limiter, Refused, Taken
from prefixes.limiter.memory import MemoryLimiter

ANNOUNCE_S: Final = 1.0
EXPIRES_S: Final = 10.0
"""A replica that was not heard of for so long is gone."""
CLOSE_S: Final = 3.0
"""How long ``close`` waits for a call that is under way."""
MAX_UNSETTLED: Final = 10_000
"""Settlements that are kept for a limiter that is away. Reservations of further ones expire."""

_log = logging.getLogger("prefixd.limits")


class Remote(Limiter, Protocol):
    """A limiter that several processes share."""

    def announce(self, replica: str, expires_s: float) -> int:
        """Say that ``replica`` lives for ``expires_s`` more, 0 for no more. How many live."""


class SharedLimiter:
    """See ``base.Limiter``. Raises nothing: while ``remote`` is away, this process counts for itself.

    A charge may then take its limit over the number of replicas, or itself where that is less, so that no request is
    refused until the outage ends.
    """

    remote = True

    def __init__(self, remote: Remote, clock: Callable[[], float] = time.time) -> None:
        """``clock`` is that of the own counters."""
        self._remote, self._own = remote, MemoryLimiter(clock)
        self._replica = uuid.uuid4().hex
        self._up, self._back_at = True, 0.0
        self._replicas = 1
        self._unsettled: dict[tuple[str, str], Mapping[str, int]] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Announce this replica again and again from now on."""
        self._thread = threading.Thread(target=self._run, name="limiter", daemon=True)
        self._thread.start()

    @property
    def up(self) -> bool:
        """Whether the shared limiter answered when it was last asked."""
        return self._up

    @property
    def replicas(self) -> int:
        """How many there were when it last answered."""
        return self._replicas

    def take(self, tenant: str, reservation_id: str, charges: Sequence[Charge], ttl_s: float) -> Taken | Refused:
        if self._up:
            try:
                return self._remote.take(tenant, reservation_id, charges, ttl_s)
            except RegistryUnavailable as error:
                self._lost(error)
        return self._own.take(tenant, reservation_id, [self._share(charge) for charge in charges], ttl_s)

    def settle(self, tenant: str, reservation_id: str, used: Mapping[str, int]) -> None:
        """Both are told: a take whose answer was lost may stand there, and was then made here too."""
        self._own.settle(tenant, reservation_id, used)
        if self._up:
            try:
                self._remote.settle(tenant, reservation_id, used)
                return
            except RegistryUnavailable as error:
                self._lost(error)
        if len(self._unsettled) < MAX_UNSETTLED:
            self._unsettled[tenant, reservation_id] = used

    def renew(self, tenant: str, reservation_ids: Sequence[str], ttl_s: float) -> None:
        self._own.renew(tenant, reservation_ids, ttl_s)
        if self._up:
            try:
                self._remote.renew(tenant, reservation_ids, ttl_s)
            except RegistryUnavailable as error:
                self._lost(error)

    def look(self) -> None:
        """Announce this replica, and hand over settlements once the shared limiter answers. Raises nothing."""
        try:
            count = self._remote.announce(self._replica, EXPIRES_S)
            if not self._up:
                _log.info("limits are shared again", extra={"facts": {"unsettled": len(self._unsettled)}})
                self._back_at, self._up = time.monotonic(), True
            if count >= self._replicas or time.monotonic() - self._back_at > EXPIRES_S:
                self._replicas = count  # one that is just back may not have heard of the others yet
            for tenant, reservation_id in list(self._unsettled):
                self._remote.settle(tenant, reservation_id, self._unsettled[tenant, reservation_id])
                del self._unsettled[tenant, reservation_id]
        except RegistryUnavailable as error:
            self._lost(error)
        except Exception:  # on any error the service goes on with its own counters
            _log.exception("the limiter cannot be used")
            self._up = False

    def close(self) -> None:
        self._closing.set()
        if self._thread:
            self._thread.join(timeout=CLOSE_S)
        try:
            if self._up:
                self._remote.announce(self._replica, 0)
        except RegistryUnavailable as error:
            self._lost(error)
        self._remote.close()

    def _share(self, charge: Charge) -> Charge:
        return replace(charge, limit=max(charge.limit // self._replicas, min(charge.amount, charge.limit)))

    def _lost(self, error: RegistryUnavailable) -> None:
        if self._up:
            facts = {"reason": error.message, "replicas": self._replicas}
            _log.warning("limits are not shared: each replica allows its part", extra={"facts": facts})
        self._up = False

    def _run(self) -> None:
        self.look()
        while not self._closing.wait(ANNOUNCE_S):
            self.look()
