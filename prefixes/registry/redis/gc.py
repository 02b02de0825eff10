"""The clean-up of one tenant in Redis, while publishers are at work.

Owns what is removed and in which order: first deleted tasks past their retention, then artifacts that no task has.
The step that removes an artifact also checks its tasks and leases, see ``scripts.COLLECT``.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefixes.registry.base import DeletedTask, GcReport
from prefixes.registry.deleted import is_past
from prefixes.registry.redis.commands import RedisCommands
from prefixes.registry.redis.reader import RedisReader
from prefixes.registry.redis.writer import RedisWriter


def collect(commands: RedisCommands, tenant: str, retention_s: float, dry_run: bool, actor: str) -> GcReport:
    """As ``Store.gc``, of one tenant."""
    reader = RedisReader(commands)
    past = [item for item in reader.deleted(tenant) if is_past(item, retention_s)]
    if not dry_run:
        past = [item for item in past if RedisWriter(commands, tenant).purge(item, actor)]
    freed_sizes = _needed_by_these_alone(reader, tenant, past) if dry_run and past else {}
    artifacts, freed = [], 0
    for version in commands.stored_versions(tenant):
        size = commands.collect(tenant, version, remove=not dry_run)
        if size < 0:
            size = freed_sizes.get(version, -1)
        if size >= 0:
            artifacts.append(f"{tenant}/{version}")
            freed += size
    return GcReport(tuple(f"{tenant}/{item.task.name}" for item in past), tuple(artifacts), freed)


def _needed_by_these_alone(reader: RedisReader, tenant: str, past: Sequence[DeletedTask]) -> dict[str, int]:
    """Versions, and their bytes, that only tasks in ``past`` have."""
    kept = [*reader.tasks(tenant), *(item.task for item in reader.deleted(tenant) if item not in past)]
    named = {info.version for task in kept for info in task.versions}
    return {info.version: info.size for item in past for info in item.task.versions if info.version not in named}
