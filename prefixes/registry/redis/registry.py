"""RedisRegistry: the registry in Redis, for many replicas: one server, a master that Sentinels name, or a Cluster.

Owns what a call of ``base.Store`` means in Redis. ``commands`` speaks to Redis, ``reader`` reads, ``writer`` makes
changes, ``gc`` cleans up. ``identity`` tells a Redis that was emptied from a new one: an emptied one is an outage, and
its tasks are not deleted. No answer to a caller names a host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry.base import AuditEntry, DeletedTask, GcReport, Resolved, TaskInfo
from prefixes.registry.deleted import latest_first
from prefixes.registry.quota import Kept
from prefixes.registry.redis.commands import RedisCommands
from prefixes.registry.redis.gc import collect
from prefixes.registry.redis.kept import kept_of
from prefixes.registry.redis.reader import RedisReader
from prefixes.registry.redis.url import RedisTarget
from prefixes.registry.redis.watch import RedisSubscription
from prefixes.registry.redis.writer import RedisWriter, audit_fields
from prefixes.registry.store import TaskStore, check_names
from prefixes.spec import TaskRef, check_name, check_version


class RedisRegistry(TaskStore):
    """See ``base.Store``. Safe for threads; open it anew after a fork."""

    def __init__(
        self, target: RedisTarget, *, create: bool = True, registry_id: str | None = None, restoring: bool = False
    ) -> None:
        """Connect, making a registry in an empty database if ``create``; see ``open_registry`` for the rest."""
        self._target = target
        self.commands = RedisCommands(target, create=create, registry_id=registry_id, restoring=restoring)
        self._identity, self._reader = self.commands.identity, RedisReader(self.commands)
        self.id, self.tenancy, self.usage = self.commands.id, self.commands.tenancy, self.commands.usage

    @property
    def restoring(self) -> bool:
        """See ``base.Store``."""
        return self._identity.restoring

    def resolve(self, ref: TaskRef) -> Resolved:
        check_names(ref.tenant, ref.name)
        return self._reader.resolved(ref) or super().resolve(ref)

    def fetch(self, tenant: str, version: str) -> bytes:
        check_name("tenant", tenant)
        check_version(version)
        if self.commands.is_named(tenant, version):
            data = self.commands.blob(tenant, version)
            if data is not None:
                return data
            if self.commands.is_named(tenant, version):  # else a clean-up took it between the two looks
                raise RegistryUnavailable(f"registry: {version} is indexed, but its artifact is missing")
        raise TaskNotFound(f"version {version}: expected one of tenant {tenant!r}, found none", version=version)

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        tenants = self.tenants() if tenant is None else [check_name("tenant", tenant)]
        return [task for name in tenants for task in self._reader.tasks(name)]

    def deleted(self, tenant: str | None = None) -> list[DeletedTask]:
        tenants = self.tenants() if tenant is None else [check_name("tenant", tenant)]
        return latest_first([item for name in tenants for item in self._reader.deleted(name)])

    def audit(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        return self._reader.audit(check_name("tenant", tenant), limit)

    def replace_audit(self, tenant: str, entries: Sequence[AuditEntry]) -> None:
        self._identity.enter(check_name("tenant", tenant))
        self.commands.replace_audit(tenant, [audit_fields(entry) for entry in entries])

    def check(self) -> None:
        self._identity.check()

    def tenants(self) -> list[str]:
        return self._identity.tenants()

    def lost_tenants(self) -> list[str]:
        return self._identity.lost_tenants()

    def kept_tenants(self) -> frozenset[str]:
        return self._identity.kept_tenants()

    def begin_restoring(self) -> None:
        self._identity.begin_restoring()

    def finish_restoring(self, forget: Sequence[str] = ()) -> None:
        self._identity.finish_restoring(forget)

    def preflight(self) -> list[str]:
        return self.commands.preflight()

    def subscribe(self, on_change: Callable[[str, str], None]) -> RedisSubscription | None:
        """As in the Protocol. A Cluster is polled: its channels belong to no single node."""
        return None if self._target.kind == "cluster" else RedisSubscription(self._target, on_change)

    def close(self) -> None:
        self.commands.close()

    def _find(self, tenant: str, name: str) -> TaskInfo | None:
        return self._reader.find(tenant, name)

    def _task_count(self, tenant: str) -> int:
        return self.commands.task_count(tenant)

    def _kept(self, tenant: str) -> Kept:
        return kept_of(self.commands, tenant)

    @contextmanager
    def _writing(self, tenant: str) -> Iterator[RedisWriter]:
        writer = RedisWriter(self.commands, check_name("tenant", tenant))
        try:
            yield writer
        finally:
            writer.close()

    def _gc_of(self, tenant: str, retention_s: float, dry_run: bool, actor: str) -> GcReport:
        return collect(self.commands, check_name("tenant", tenant), retention_s, dry_run, actor)
