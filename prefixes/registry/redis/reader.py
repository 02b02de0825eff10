"""RedisReader: a tenant's tasks, deleted tasks and audit, read from Redis.

Owns the way from stored JSON to values, and what is wrong with a JSON that is none. A reference is resolved without
reading a large task whole: its JSON begins with the aliases, and an artifact begins with its metadata. Changes nothing.
"""

from __future__ import annotations

from prefixes.errors import InvalidArtifact, RegistryUnavailable
from prefixes.registry.base import AuditEntry, DeletedTask, Resolved, TaskInfo
from prefixes.registry.deleted import latest_first
from prefixes.registry.records import audit_from_dict, deleted_from_dict, task_from_dict
from prefixes.registry.redis.commands import RedisCommands
from prefixes.registry.stored_json import HEAD_BYTES, aliases_at_head, parsed
from prefixes.registry.transitions import no_task, resolved
from prefixes.spec import PrefixSpec, TaskRef


class RedisReader:
    """Every method raises RegistryUnavailable where Redis cannot be read or holds something else."""

    def __init__(self, commands: RedisCommands) -> None:
        self._commands = commands

    def find(self, tenant: str, name: str) -> TaskInfo | None:
        """The task, or None."""
        raw = self._commands.task(tenant, name)
        return _task(raw, tenant, name) if raw is not None else None

    def resolved(self, ref: TaskRef) -> Resolved | None:
        """What ``ref`` means now, None where only the whole task can tell. Raises TaskNotFound."""
        head = self._commands.task_head(ref.tenant, ref.name, HEAD_BYTES)
        if not head:
            raise no_task(ref.tenant, ref.name)
        if len(head) < HEAD_BYTES:
            return resolved(_task(head, ref.tenant, ref.name), ref)
        aliases = aliases_at_head(head)
        if aliases is None:
            return None
        known = TaskInfo(ref.tenant, ref.name, aliases, {}, ())
        version = ref.version or aliases.get(ref.alias or "")
        spec = self._spec(known, version) if version else None
        if version and spec:
            return Resolved(ref.tenant, ref.name, version, spec)
        if version is None or (ref.version and not self._commands.version_head(ref.tenant, ref.name, version, 1)[0]):
            return resolved(known, ref)  # raises
        return None  # it was deleted meanwhile, or its artifact is damaged

    def _spec(self, task: TaskInfo, version: str) -> PrefixSpec | None:
        """The metadata of a version from its artifact's header, None where it is not there."""
        from prefixes.artifact import header_bytes, read_spec

        named, start = self._commands.version_head(task.tenant, task.name, version, HEAD_BYTES)
        try:
            if named and header_bytes(start) > len(start):
                named, start = self._commands.version_head(task.tenant, task.name, version, header_bytes(start))
            return read_spec(start) if named else None
        except InvalidArtifact:
            return None

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
