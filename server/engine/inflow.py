"""How many requests may wait, of all tenants together, of each and of each key, and those on their way to the engine.

Owns the bounds and the counts of what was submitted and has not been taken yet. Knows no queue and no thread; any
thread may call it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from prefixes.errors import QueueFull
from prefixes.tenancy.limits import Limits
from server.engine.config import no_limits
from server.engine.types import GenerationRequest


class Inflow:
    """``most`` requests may wait, and of them ``most_per_tenant`` of one caller; None is no bound of its own.

    ``limits_of`` gives the limits of a tenant, and with a key's id those of that key: of each ``requests_waiting``.
    """

    def __init__(
        self,
        most: int,
        most_per_tenant: int | None = None,
        limits_of: Callable[[str, str | None], Limits] = no_limits,
    ) -> None:
        self._most, self._most_per_tenant, self._limits_of = most, most_per_tenant, limits_of
        self._on_their_way = Counter[tuple[str, str | None]]()  # by caller, with a key None, and by caller and key
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(count for (_, key), count in self._on_their_way.items() if key is None)

    def check(self, request: GenerationRequest, waiting: Callable[[str | None, str | None], int]) -> None:
        """Raise QueueFull unless ``request`` may wait too.

        ``waiting`` gives how many wait in the engine: of a caller's key, of a caller with the key None, of all with
        both None.
        """
        caller, key = request.caller, request.key
        _require(waiting(None, None) + len(self), self._most, "waiting requests")
        of_caller, of_tenant = self._waiting(caller, None, waiting), f"waiting requests of tenant {caller!r}"
        _require(of_caller, self._most_per_tenant, f"{of_tenant} (max_waiting_per_tenant)")
        own = self._limits_of(caller, None).requests_waiting
        _require(of_caller, own, f"{of_tenant} (its requests_waiting)", limit="requests_waiting", of="tenant")
        if key is not None:
            own, of_key = self._limits_of(caller, key).requests_waiting, f"waiting requests of key {key!r}"
            found = self._waiting(caller, key, waiting)
            _require(found, own, f"{of_key} (its requests_waiting)", limit="requests_waiting", of="key")

    def submitted(self, request: GenerationRequest) -> None:
        """``request`` is on its way."""
        with self._lock:
            self._on_their_way.update(_names(request))

    def taken(self, request: GenerationRequest) -> None:
        """The engine's thread has it."""
        with self._lock:
            for name in _names(request):
                self._on_their_way[name] -= 1
                if not self._on_their_way[name]:
                    del self._on_their_way[name]

    def _waiting(self, caller: str, key: str | None, waiting: Callable[[str | None, str | None], int]) -> int:
        with self._lock:
            return waiting(caller, key) + self._on_their_way[caller, key]


def _names(request: GenerationRequest) -> set[tuple[str, str | None]]:
    return {(request.caller, None), (request.caller, request.key)}


def _require(waiting: int, most: int | None, what: str, **whose: str) -> None:
    if most is not None and waiting >= most:
        raise QueueFull(
            f"queue: expected at most {most} {what}, there are {waiting}",
            **whose, expected=most, got=waiting, retry_after_s=1,
        )  # fmt: skip
