"""RedisReader: a tenant's tasks, deleted tasks and audit, read from Redis.

Owns the way from stored JSON to values, and what is wrong with a JSON that is none. Changes nothing.
"""

from __future__ import annotations

from prefixes.errors import RegistryUnavailable
from prefixes.registry.base import AuditEntry, DeletedTask, TaskInfo
from prefixes.registry.deleted import latest_first
from prefixes.registry.records import audit_from_dict, deleted_from_dict, task_from_dict
from prefixes.registry.redis.commands import RedisCommands
from prefixes.registry.stored_json import parsed


class RedisReader:
    """Every method raises RegistryUnavailable where Redis cannot be read or holds something else."""

    def __init__(self, commands: RedisCommands) -> None:
        self._commands = commands

    def find(self, tenant: str, name: str) -> TaskInfo | None:
        """The task, or None."""
        raw = self._commands.task(tenant, name)
        return _task(raw, tenant, name) if raw is not None else None

    def tasks(self, tenant: str) -> list[TaskInfo]:
        """Every task, sorted by name."""
        return [_task(raw, tenant, name) for name, raw in self._commands.tasks(tenant)]

    def deleted(self, tenant: str) -> list[DeletedTask]:
        """Every deleted task, the latest first."""
        texts = self._commands.deleted(tenant)
        return latest_first([parsed(raw, deleted_from_dict, f"{tenant}/{key}") for key, raw in texts.items()])

    def audit(self, tenant: str, limit: int) -> list[AuditEntry]:
        """The last ``limit`` audit entries, the latest first."""
        absent: dict[str, str | None] = {"alias": None, "old": None, "new": None}
        entries = self._commands.audit(tenant, limit)
        try:
            texts = ({key.decode(): value.decode() for key, value in fields.items()} for fields in entries)
            return [audit_from_dict({**absent, **text}) for text in texts]
        except ValueError as error:
            raise RegistryUnavailable(f"registry: the audit of {tenant}: {str(error)[:200]}") from None


def _task(raw: bytes, tenant: str, name: str) -> TaskInfo:
    task = parsed(raw, task_from_dict, f"{tenant}/{name}")
    if (task.tenant, task.name) != (tenant, name):
        raise RegistryUnavailable(f"registry: expected the task {tenant}/{name}, found another in its place")
    return task
