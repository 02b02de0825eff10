"""How much Redis keeps of a tenant: a total that every change keeps up, and what to do where there is none.

Owns the counting of a tenant without a total: one of an older release, or one that such a release has changed since.
"""

from __future__ import annotations

from typing import Final

from prefixes.errors import RegistryUnavailable
from prefixes.registry.quota import Kept, kept_by
from prefixes.registry.redis.commands import RedisCommands
from prefixes.registry.redis.reader import RedisReader

ATTEMPTS: Final = 5


def kept_of(commands: RedisCommands, tenant: str) -> Kept:
    """The total; where there is none, every task is read once. Raises RegistryUnavailable, also for damaged tasks."""
    reader = RedisReader(commands)
    for _ in range(ATTEMPTS):
        last, total = commands.total(tenant)
        if total is not None:
            return Kept(*total)
        counted = kept_by(reader.tasks(tenant), reader.deleted(tenant))
        if commands.note_total(tenant, last, counted.tasks, counted.versions, counted.size):
            return counted
    raise RegistryUnavailable(f"registry: {tenant} was changed each time that its tasks were counted; try again")
