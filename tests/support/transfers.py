"""Makes a registry to copy and reads what became of the copy. Knows no test."""

from __future__ import annotations

from typing import Final

from prefixes.registry.base import Store
from prefixes.registry.transfer import Report
from tests.support.disk import DATA, VERSIONS

ALL: Final = ["acme/e2e", "default/e2e", "default/other"]
"""The tasks of ``fill``."""


def publish(registry: Store, *indices: int, tenant: str = "default", name: str = "e2e") -> None:
    """Publish artifacts by their number, one after the other."""
    for index in indices:
        registry.publish(tenant, name, DATA[index], record={"number": index}, actor="ci")


def fill(registry: Store) -> Store:
    """Three tasks of two tenants, one with a past, and a deleted one."""
    publish(registry, 0, 1, 2)
    registry.promote("default", "e2e", VERSIONS[0], alias="stable")
    registry.rollback("default", "e2e")
    publish(registry, 0, name="other")
    publish(registry, 1, tenant="acme")
    publish(registry, 2, name="gone")
    registry.delete("default", "gone")
    return registry


def results(report: Report) -> dict[str, str]:
    """Each task's result."""
    return {outcome.task: outcome.result for outcome in report.outcomes}


def assert_same(left: Store, right: Store) -> None:
    """The same tasks, times and records included, and the same artifacts."""
    assert left.tasks() == right.tasks()
    for task in left.tasks():
        for info in task.versions:
            assert left.fetch(task.tenant, info.version) == right.fetch(task.tenant, info.version)
