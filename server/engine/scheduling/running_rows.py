"""How many rows run, of each tenant and of each key, and whether more may. Torch-free.

Owns these counts. The limits are asked for each time, so that a changed one holds from the next admission on. Knows
neither queues nor blocks.

A request that asks for more rows than its whole limit is refused when it is submitted (``admission``). Where a limit
fell below the rows of one that waits already, that one runs when nothing else of its tenant or key does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum, auto

from prefixes.tenancy.limits import Limits
from server.engine.types import GenerationRequest


class HeldBy(Enum):
    """Whose limit keeps a request out for now."""

    KEY = auto()
    TENANT = auto()


class RunningRows:
    """The rows of the requests that run. The engine's thread alone calls it."""

    def __init__(self, limits_of: Callable[[str, str | None], Limits]) -> None:
        """``limits_of`` gives the limits of a tenant, and with a key's id those of that key."""
        self._limits_of = limits_of
        self.total = 0
        self._of_tenant = Counter[str]()
        self._of_key = Counter[str]()

    def add(self, request: GenerationRequest) -> None:
        """``request`` runs from now on."""
        rows = request.params.rows
        self.total += rows
        self._of_tenant[request.caller] += rows
        if request.key is not None:
            self._of_key[request.key] += rows

    def remove(self, request: GenerationRequest) -> None:
        """``request`` no longer runs."""
        rows = request.params.rows
        self.total -= rows
        _lower(self._of_tenant, request.caller, rows)
        if request.key is not None:
            _lower(self._of_key, request.key, rows)

    def recount(self, running: Iterable[GenerationRequest]) -> None:
        """After a fault: these run, and no others."""
        self.total, self._of_tenant, self._of_key = 0, Counter(), Counter()
        for request in running:
            self.add(request)

    def holds_back(self, request: GenerationRequest) -> HeldBy | None:
        """Whose limit ``request`` would exceed now; None if it may run."""
        rows, tenant, key = request.params.rows, request.caller, request.key
        if key is not None and _exceeds(self._of_key[key], rows, self._limits_of(tenant, key).rows_running):
            return HeldBy.KEY
        if _exceeds(self._of_tenant[tenant], rows, self._limits_of(tenant, None).rows_running):
            return HeldBy.TENANT
        return None


def _exceeds(running: int, rows: int, most: int | None) -> bool:
    return most is not None and running > 0 and running + rows > most


def _lower(counts: Counter[str], name: str, rows: int) -> None:
    counts[name] -= rows
    if not counts[name]:
        del counts[name]
