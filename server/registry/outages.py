"""Tenants whose part of the registry does not answer while the rest does, as in a Cluster that has lost a node.

Owns when such a tenant is asked for again: by one read at a time. So reads that get no answer never hold all the
threads that the other tenants need. Knows no task and no registry.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final

from prefixes.errors import RegistryUnavailable

SLOW_S: Final = 0.5
"""A faster failure held nobody up. It may be one task's damage and says nothing about the tenant's other tasks."""
PAUSE_S: Final = 0.5
"""The pause between a slow failure and the next try."""
TRY_S: Final = 2.0
"""How long the tenant's other requests are refused while that try runs."""
FORGET_S: Final = 60.0


@dataclass(frozen=True)
class _Outage:
    error: RegistryUnavailable
    noted_at: float  # time.monotonic() seconds
    until: float


class TenantOutages:
    """Thread-safe: every step is one operation of the dict."""

    def __init__(self) -> None:
        self._outages: dict[str, _Outage] = {}

    def require_up(self, tenant: str) -> None:
        """Raise RegistryUnavailable, as the last read did, until it is time for the next try."""
        outage = self._outages.get(tenant)
        if outage is not None and time.monotonic() < outage.until:
            raise type(outage.error)(outage.error.message)

    def require_none_since(self, tenant: str, moment: float) -> None:
        """Raise RegistryUnavailable if another read has failed slowly since ``moment``.

        A read that waited for its thread since then need not wait as long again.
        """
        outage = self._outages.get(tenant)
        if outage is not None and outage.noted_at >= moment:
            raise type(outage.error)(outage.error.message)

    def trying(self, tenant: str) -> bool:
        """A read begins. Returns whether the last one failed slowly; if so, no other read begins for ``TRY_S``."""
        outage = self._outages.get(tenant)
        if outage is not None:
            self._outages[tenant] = replace(outage, until=time.monotonic() + TRY_S)
        return outage is not None

    def answered(self, tenant: str) -> None:
        """A read succeeded, or its answer was that there is no such task."""
        self._outages.pop(tenant, None)

    def failed(self, tenant: str, seconds: float, error: RegistryUnavailable) -> None:
        """A read failed after ``seconds``."""
        now = time.monotonic()
        if seconds >= SLOW_S:
            for name, outage in list(self._outages.items()):
                if outage.until < now - FORGET_S:  # nobody asks for it any more
                    self._outages.pop(name, None)
            self._outages[tenant] = _Outage(error, now, now + PAUSE_S)
        else:
            self._outages.pop(tenant, None)
