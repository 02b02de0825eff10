"""Tenants whose part of the registry does not answer while the rest does, as of a Cluster that has lost a node.

Owns when such a tenant is asked for again: by one read at a time, so that those who wait for an answer that does not
come never hold all the threads that the other tenants need. Knows no task and no registry.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final

from prefixes.errors import RegistryUnavailable

SLOW_S: Final = 0.5
"""A failure that took less held nobody up; it may be one task's damage and tell nothing of the tenant's others."""
PAUSE_S: Final = 0.5
"""From a slow failure to the next try."""
TRY_S: Final = 2.0
"""How long the others of the tenant leave it to that try."""
FORGET_S: Final = 60.0


@dataclass(frozen=True)
class _Outage:
    error: RegistryUnavailable
    noted_at: float  # time.monotonic() seconds
    until: float


class TenantOutages:
    """Thread-safe: every step is one of the dict's."""

    def __init__(self) -> None:
        self._outages: dict[str, _Outage] = {}

    def require_up(self, tenant: str) -> None:
        """Raise RegistryUnavailable, as the last read did, while it is not the time for a try."""
        outage = self._outages.get(tenant)
        if outage is not None and time.monotonic() < outage.until:
            raise type(outage.error)(outage.error.message)

    def require_none_since(self, tenant: str, moment: float) -> None:
        """Raise RegistryUnavailable if another read has failed slowly since: this one waited for its thread as long."""
        outage = self._outages.get(tenant)
        if outage is not None and outage.noted_at >= moment:
            raise type(outage.error)(outage.error.message)

    def trying(self, tenant: str) -> bool:
        """A read begins; whether the last one failed slowly. Nobody else asks meanwhile, then."""
        outage = self._outages.get(tenant)
        if outage is not None:
            self._outages[tenant] = replace(outage, until=time.monotonic() + TRY_S)
        return outage is not None

    def answered(self, tenant: str) -> None:
        """A read went well, or its answer was that there is no such task."""
        self._outages.pop(tenant, None)

    def failed(self, tenant: str, seconds: float, error: RegistryUnavailable) -> None:
        """A read failed after so long."""
        now = time.monotonic()
        if seconds >= SLOW_S:
            for name, outage in list(self._outages.items()):
                if outage.until < now - FORGET_S:  # nobody asks for it any more
                    self._outages.pop(name, None)
            self._outages[tenant] = _Outage(error, now, now + PAUSE_S)
        else:
            self._outages.pop(tenant, None)
