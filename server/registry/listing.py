"""Lists all tasks that a caller may see.

Owns the rule that one tenant's damaged data is no outage for the others. Knows no HTTP.
"""

from __future__ import annotations

import logging

from prefixes.errors import RegistryUnavailable
from prefixes.registry.base import Store, TaskInfo
from server.web.auth import Action, Caller, may

_log = logging.getLogger("prefixd.registry")


def visible_tasks(registry: Store, caller: Caller) -> list[TaskInfo]:
    """The tasks of every tenant that ``caller`` may read, sorted by tenant and name.

    A tenant whose tasks cannot be read is left out and logged. Raises RegistryUnavailable if that is the caller's own
    tenant, or if the registry is away.
    """
    found: list[TaskInfo] = []
    for tenant in registry.tenants():
        if not may(caller, Action.READ, tenant):
            continue
        try:
            found += registry.tasks(tenant)
        except RegistryUnavailable as error:
            registry.check()
            if tenant == caller.tenant:
                raise
            facts = {"tenant": tenant, "reason": error.message}
            _log.error("a tenant's tasks cannot be listed", extra={"facts": facts})
    return found
