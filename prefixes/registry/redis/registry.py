"""RedisRegistry: the registry in Redis, for many replicas: one server, a master that Sentinels name, or a Cluster.

Owns what is read and what a call means to Redis; how a change is made is ``redis_writer``'s, where keys lie
``redis_keys``'s. A Redis that was emptied, wholly or a node of it, is told from one that holds nothing yet by
``redis_identity``: it is an outage then, not a deletion. Answers of callers name no hosts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry.base import AuditEntry, DeletedTask, GcReport, TaskInfo
from prefixes.registry.deleted import latest_first
from prefixes.registry.records import audit_from_dict, deleted_from_dict, task_from_dict
from prefixes.registry.redis import scripts
from prefixes.registry.redis.errors import FAILURES, guarded
from prefixes.registry.redis.gc import collect
from prefixes.registry.redis.identity import RedisIdentity
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.preflight import inspect_servers
from prefixes.registry.redis.url import RedisTarget, disconnect, disconnect_idle
from prefixes.registry.redis.watch import RedisSubscription
from prefixes.registry.redis.writer import RedisWriter
from prefixes.registry.store import TaskStore, parsed
from prefixes.spec import check_name, check_version

READ_PATIENCE: Final = 3.0
"""An artifact's megabytes may begin to come this much later than an answer of a line."""
WRITE_PATIENCE: Final = 10.0
"""And take this much longer to go out and be stored, all of them."""
_CHUNK: Final = 100  # tasks read at once


class RedisRegistry(TaskStore):
    """See ``base.Store``. Safe for threads; open it anew after a fork."""

    def __init__(
        self, target: RedisTarget, *, create: bool = True, registry_id: str | None = None, restoring: bool = False
    ) -> None:
        """Connect, making a registry in an empty database if ``create``; see ``open_registry`` for the rest."""
        self._target = target
        self.timeout_ms = int(target.timeout_s * 1000)
        with guarded():
            self._client = target.connect()
            self._blobs = target.connect(patience=READ_PATIENCE)
            self._uploads = target.connect(patience=WRITE_PATIENCE)
        self._begin, self._commit, self._lease, self._collect = (
            self._client.register_script(text)
            for text in (scripts.BEGIN, scripts.COMMIT, scripts.LEASE, scripts.COLLECT)
        )
        self.identity = RedisIdentity(self._client, create=create, registry_id=registry_id, restoring=restoring)
        self.id = self.identity.id

    @property
    def restoring(self) -> bool:
        """See ``base.Store``."""
        return self.identity.restoring

    # --- what the Protocol asks ---

    def fetch(self, tenant: str, version: str) -> bytes:
        check_name("tenant", tenant)
        check_version(version)
        keys = TenantKeys(tenant)
        if self._is_named(tenant, version):
            with guarded():
                data: bytes | None = self._blobs.get(keys.blob(version))
            if data is not None:
                return data
            if self._is_named(tenant, version):  # else it was cleaned away between the two looks
                raise RegistryUnavailable(f"registry: {version} is indexed, but its artifact is missing")
        raise TaskNotFound(f"version {version}: expected one of tenant {tenant!r}, found none", version=version)

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        tenants = self.tenants() if tenant is None else [check_name("tenant", tenant)]
        return [task for name in tenants for task in self._tasks_of(name)]

    def deleted(self, tenant: str | None = None) -> list[DeletedTask]:
        tenants = self.tenants() if tenant is None else [check_name("tenant", tenant)]
        return latest_first([item for name in tenants for item in self._deleted_of(name)])

    def audit(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        keys = TenantKeys(check_name("tenant", tenant))
        with guarded():
            entries = self._client.xrevrange(keys.audit, count=limit)
            self.identity.check_list(tenant)
        absent: dict[str, str | None] = {"alias": None, "old": None, "new": None}
        texts = ({key.decode(): value.decode() for key, value in fields.items()} for _, fields in entries)
        try:
            return [audit_from_dict({**absent, **text}) for text in texts]
        except ValueError as error:
            raise RegistryUnavailable(f"registry: the audit of {tenant}: {str(error)[:200]}") from None

    def check(self) -> None:
        self.identity.check()

    def tenants(self) -> list[str]:
        return self.identity.tenants()

    def lost_tenants(self) -> list[str]:
        return self.identity.lost_tenants()

    def kept_tenants(self) -> frozenset[str]:
        return self.identity.kept_tenants()

    def begin_restoring(self) -> None:
        self.identity.begin_restoring()

    def finish_restoring(self, forget: Sequence[str] = ()) -> None:
        self.identity.finish_restoring(forget)

    def preflight(self) -> list[str]:
        with guarded():
            return inspect_servers(self._client, cluster=self._target.kind == "cluster")

    def subscribe(self, on_change: Callable[[str, str], None]) -> RedisSubscription | None:
        """As in the Protocol. A Cluster is polled: its channels are no one node's."""
        return None if self._target.kind == "cluster" else RedisSubscription(self._target, on_change)

    def close(self) -> None:
        for client in (self._client, self._blobs, self._uploads):
            with suppress(*FAILURES):
                disconnect(client)

    # --- what the writer asks ---

    def lease(self, keys: TenantKeys, version: str, publisher: str, seconds: float) -> bool:
        """Keep the clean-up away from an artifact for a while; False where the tenant's data is not this registry's."""
        with guarded():
            held = self._lease(
                keys=[keys.id, keys.lease(version), keys.blobs], args=[self.id, publisher, int(seconds * 1000), version]
            )
        return bool(held)

    def release(self, keys: TenantKeys, versions: Iterable[str], publisher: str) -> None:
        """Give leases back; those that cannot be given back end by themselves."""
        with suppress(*FAILURES):
            for version in versions:
                self._client.zrem(keys.lease(version), publisher)

    def write_blob(self, key: str, data: bytes) -> None:
        """Store an artifact.

        On a new connection: an old one may lead to a master that hangs and was replaced, and wait for it for long.
        """
        with guarded():
            disconnect_idle(self._uploads)
            self._uploads.set(key, data)

    def begin(self, tenant: str, name: str) -> tuple[int, bytes | None]:
        """The server's clock in milliseconds, and the task's JSON. Raises RegistryUnavailable for lost data."""
        keys = TenantKeys(tenant)
        with guarded():
            clock_ms, found, raw = self._begin(keys=[keys.id, keys.task(name)])
            self.identity.check_found(tenant, found)
            self.identity.check()  # while it is being restored nothing is changed, what is back already included
        return int(clock_ms), raw

    def commit(
        self,
        keys: Sequence[str],
        *,
        latest_ms: int,
        planned_on: str,
        unearthed: str,
        operations: str,
        needed: Sequence[int],
        channel: str,
        message: str,
    ) -> str:
        """Run the script of that name: "made", "again", "gone", "late", "missing" or "foreign"."""
        if self._target.kind == "cluster":
            channel = ""
        there = json.dumps(list(needed))
        with guarded():
            outcome = self._commit(
                keys=list(keys),
                args=[self.id, latest_ms, planned_on, unearthed, operations, there, channel, message],
            )
        return bytes(outcome).decode()

    def artifacts(self, keys: TenantKeys) -> list[str]:
        """Versions that have an artifact, named or not."""
        with guarded():
            return sorted(name.decode() for name in self._client.smembers(keys.blobs))

    def collect(self, keys: TenantKeys, version: str, *, remove: bool) -> int:
        """Run the script of that name: the artifact's bytes, -1 where something keeps it."""
        with guarded():
            size = self._collect(
                keys=[keys.blob(version), keys.names(version), keys.lease(version), keys.blobs, keys.id],
                args=[version, "1" if remove else "0", self.id],
            )
        return int(size)

    def _gc_of(self, tenant: str, retention_s: float, dry_run: bool, actor: str) -> GcReport:
        return collect(self, tenant, retention_s, dry_run, actor)

    # --- reading ---

    def _find(self, tenant: str, name: str) -> TaskInfo | None:
        keys = TenantKeys(tenant)
        with guarded():
            found, raw = self._client.mget(keys.id, keys.task(name))
            self.identity.check_found(tenant, found)
            if raw is None:
                self.identity.check()  # while it is being restored, what is not there is not gone
        return self._task(raw, tenant, name) if raw is not None else None

    @contextmanager
    def _writing(self, tenant: str) -> Iterator[RedisWriter]:
        writer = RedisWriter(self, check_name("tenant", tenant))
        try:
            yield writer
        finally:
            writer.close()

    def _tasks_of(self, tenant: str) -> list[TaskInfo]:
        keys = TenantKeys(tenant)
        found: list[TaskInfo] = []
        with guarded():
            names = sorted(name.decode() for name in self._client.smembers(keys.tasks))
            for begin in range(0, len(names), _CHUNK):
                chunk = names[begin : begin + _CHUNK]
                texts = zip(chunk, self._client.mget([keys.task(name) for name in chunk]), strict=True)
                found += [self._task(raw, tenant, name) for name, raw in texts if raw is not None]
            self.identity.check_list(tenant)
        return found

    def _deleted_of(self, tenant: str) -> list[DeletedTask]:
        keys = TenantKeys(tenant)
        with guarded():
            texts = self._client.hgetall(keys.deleted)
            self.identity.check_list(tenant)
        return [parsed(raw, deleted_from_dict, f"{tenant}/{key.decode()}") for key, raw in texts.items()]

    def _task(self, raw: bytes, tenant: str, name: str) -> TaskInfo:
        task = parsed(raw, task_from_dict, f"{tenant}/{name}")
        if (task.tenant, task.name) != (tenant, name):
            raise RegistryUnavailable(f"registry: expected the task {tenant}/{name}, found another in its place")
        return task

    def _is_named(self, tenant: str, version: str) -> bool:
        keys = TenantKeys(tenant)
        with guarded():
            named = bool(self._client.exists(keys.names(version)))
            self.identity.check_tenant(tenant)
            if not named:
                self.identity.check()  # as in _find
        return named
