"""The clean-up of one tenant in Redis, while publishers are at work.

Owns what goes and its order: deleted tasks past their retention, then the artifacts that nothing names any more.
Whether something names or leases an artifact is looked at in the very step that removes it, see ``redis_scripts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefixes.registry.base import DeletedTask, GcReport
from prefixes.registry.deleted import is_past
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.writer import RedisWriter

if TYPE_CHECKING:
    from prefixes.registry.redis.registry import RedisRegistry


def collect(registry: RedisRegistry, tenant: str, retention_s: float, dry_run: bool, actor: str) -> GcReport:
    """As ``Store.gc``, of one tenant."""
    past = [item for item in registry.deleted(tenant) if is_past(item, retention_s)]
    if not dry_run:
        past = [item for item in past if RedisWriter(registry, tenant).purge(item, actor)]
    due = _kept_by_these_alone(registry, tenant, past) if dry_run and past else {}
    keys, artifacts, freed = TenantKeys(tenant), [], 0
    for version in registry.artifacts(keys):
        size = registry.collect(keys, version, remove=not dry_run)
        if size < 0:
            size = due.get(version, -1)
        if size >= 0:
            artifacts.append(f"{tenant}/{version}")
            freed += size
    return GcReport(tuple(f"{tenant}/{item.task.name}" for item in past), tuple(artifacts), freed)


def _kept_by_these_alone(registry: RedisRegistry, tenant: str, past: Sequence[DeletedTask]) -> dict[str, int]:
    """Versions, and their bytes, that nothing would name if ``past`` were gone."""
    kept = [*registry.tasks(tenant), *(item.task for item in registry.deleted(tenant) if item not in past)]
    named = {info.version for task in kept for info in task.versions}
    return {info.version: info.size for item in past for info in item.task.versions if info.version not in named}
