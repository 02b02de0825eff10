"""Listing: the tasks of a registry that ``transfer`` is to copy.

Owns the list and its failures: a tenant whose index is damaged is noted, and the other tenants are listed.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefixes.registry.base import Store, TaskInfo
from prefixes.registry.failed_tenants import FailedTenants


@dataclass
class Listing:
    """Tasks, how many deleted ones there are beside them, and why tenants could not be listed."""

    tasks: list[TaskInfo]
    deleted: int
    damaged: dict[str, str]  # tenants whose tasks cannot be listed, and why
    uncounted: dict[str, str]  # tenants whose deleted tasks cannot be listed, and why

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Each tenant that failed, once, and why."""
        return [*self.damaged.items(), *(item for item in self.uncounted.items() if item[0] not in self.damaged)]

    @property
    def tenants(self) -> set[str]:
        """Every tenant that was found, damaged or not."""
        return {task.tenant for task in self.tasks} | self.damaged.keys()


def list_tasks(source: Store, tenant: str | None, name: str | None) -> Listing:
    """The tasks of all tenants, of one, or one task. Raises TaskNotFound, RegistryUnavailable."""
    if tenant is not None and name is not None:
        deleted = 0
        with FailedTenants(source).skip_failed(tenant):  # another task, a deleted one, may be damaged
            deleted = sum(item.task.name == name for item in source.deleted(tenant))
        return Listing([source.inspect(tenant, name)], deleted, {}, {})
    damaged, uncounted = FailedTenants(source), FailedTenants(source)
    listing = Listing([], 0, damaged.reasons, uncounted.reasons)
    for each in [tenant] if tenant is not None else source.tenants():
        with damaged.skip_failed(each):
            listing.tasks += source.tasks(each)
        with uncounted.skip_failed(each):
            listing.deleted += len(source.deleted(each))
    return listing
