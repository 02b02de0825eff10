"""Lists all tasks that a caller may see.

Owns the rule that one tenant's damaged data is no outage for the others. Knows no HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry.base import Store, TaskInfo
from server.web.auth import Action, Caller, may

_log = logging.getLogger("prefixd.registry")


def visible_tasks(registry: Store, caller: Caller) -> list[TaskInfo]:
    """The tasks that ``caller`` may read, sorted by tenant and name: its own and those shared with it, or all.

    A tenant whose tasks cannot be read is left out and logged. Raises RegistryUnavailable if that is the caller's own
    tenant, or if the registry is away.
    """
    found: list[TaskInfo] = []
    for tenant in registry.tenants() if caller.operates else [caller.tenant]:
        try:
            found += registry.tasks(tenant)
        except RegistryUnavailable as error:
            if tenant == caller.tenant:
                raise
            _left_out(registry, tenant, error)
    if not caller.operates:
        found += _shared(registry, caller)
    return sorted(found, key=lambda task: (task.tenant, task.name))


def _shared(registry: Store, caller: Caller) -> Iterator[TaskInfo]:
    for task in caller.shares:
        tenant, _, name = task.partition("/")
        if tenant != caller.tenant and may(caller, Action.READ, tenant, name):
            try:
                yield registry.inspect(tenant, name)
            except TaskNotFound:
                continue  # deleted; the share stays for one of its name
            except RegistryUnavailable as error:
                _left_out(registry, tenant, error)


def _left_out(registry: Store, tenant: str, error: RegistryUnavailable) -> None:
    registry.check()
    _log.error("a tenant's tasks cannot be listed", extra={"facts": {"tenant": tenant, "reason": error.message}})
