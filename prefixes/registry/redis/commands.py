"""RedisCommands: the one place that speaks to Redis for one registry.

Owns the clients and the scripts. Every command checks that the tenant's data is this registry's, and names redis-py's
errors. Takes and gives bytes; does not know what a task's JSON says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final

from prefixes.registry.limits import AUDIT_KEPT
from prefixes.registry.redis import scripts
from prefixes.registry.redis.blobs import RedisBlobs
from prefixes.registry.redis.errors import FAILURES, guarded
from prefixes.registry.redis.identity import RedisIdentity
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.preflight import inspect_servers
from prefixes.registry.redis.tenancy import RedisTenancy
from prefixes.registry.redis.url import RedisTarget, disconnect
from prefixes.registry.redis.usage import RedisUsage

READ_PATIENCE: Final = 3.0
"""A piece of an artifact may take so many times as long to begin to arrive as a short answer."""
WRITE_PATIENCE: Final = 10.0
"""A piece of an artifact may take so many times as long to be sent and stored as a short command."""
_CHUNK: Final = 100  # tasks read by one command


class RedisCommands:
    """Every command raises RegistryUnavailable where Redis cannot answer or has lost the tenant's data."""

    def __init__(
        self, target: RedisTarget, *, create: bool = True, registry_id: str | None = None, restoring: bool = False
    ) -> None:
        """Connect. See ``open_registry`` for the options."""
        self.timeout_ms = int(target.timeout_s * 1000)
        self._is_cluster = target.kind == "cluster"
        with guarded():
            self._client = target.connect()
            self._reads, self._writes = (target.connect(patience=wait) for wait in (READ_PATIENCE, WRITE_PATIENCE))
            self._blobs = RedisBlobs(self._reads, self._writes)
        (
            self._begin, self._commit, self._lease, self._collect, self._task_head, self._version_head, self._total,
            self._note_total,
        ) = (
            self._client.register_script(text)
            for text in (
                scripts.BEGIN, scripts.COMMIT, scripts.LEASE, scripts.COLLECT, scripts.TASK_HEAD, scripts.VERSION_HEAD,
                scripts.TOTAL, scripts.NOTE_TOTAL,
            )
        )  # fmt: skip
        self._replace_audit = self._writes.register_script(scripts.REPLACE_AUDIT)
        self.identity = RedisIdentity(self._client, create=create, registry_id=registry_id, restoring=restoring)
        self.id = self.identity.id
        self.tenancy = RedisTenancy(self._client, self.identity)
        self.usage = RedisUsage(self._client, self.identity)

    def preflight(self) -> list[str]:
        """See ``base.Store``."""
        with guarded():
            return inspect_servers(self._client, cluster=self._is_cluster)

    def close(self) -> None:
        """Close every connection."""
        for client in (self._client, self._reads, self._writes):
            with suppress(*FAILURES):
                disconnect(client)

    # --- reading ---

    def task(self, tenant: str, name: str) -> bytes | None:
        """The task's JSON, None where the tenant has no such task."""
        keys = TenantKeys(tenant)
        with guarded():
            raw: bytes | None
            found, raw = self._client.mget(keys.id, keys.task(name))
            self.identity.check_found(tenant, found)
            if raw is None:
                self.identity.check()  # a restore may still bring a task that is missing
        return raw

    def task_head(self, tenant: str, name: str, size: int) -> bytes:
        """The first ``size`` bytes of the task's JSON, none where the tenant has no such task."""
        keys = TenantKeys(tenant)
        with guarded():
            found, head = self._task_head(keys=[keys.id, keys.task(name)], args=[size])
            self.identity.check_found(tenant, found)
            if not head:
                self.identity.check()  # as in ``task``
        return bytes(head)

    def version_head(self, tenant: str, name: str, version: str, size: int) -> tuple[bool, bytes]:
        """Whether the task has the version, and the first ``size`` bytes of its artifact."""
        keys = TenantKeys(tenant)
        with guarded():
            found, named, head = self._version_head(
                keys=[keys.id, keys.names(version), keys.blob(version)], args=[name, size]
            )
            self.identity.check_found(tenant, found)
        return bool(named), bytes(head)

    def tasks(self, tenant: str) -> Iterator[tuple[str, bytes]]:
        """Name and JSON of every task, sorted by name. The check for lost data comes last: read to the end."""
        keys = TenantKeys(tenant)
        with guarded():
            names = sorted(name.decode() for name in self._client.smembers(keys.tasks))
            for begin in range(0, len(names), _CHUNK):
                chunk = names[begin : begin + _CHUNK]
                texts = zip(chunk, self._client.mget([keys.task(name) for name in chunk]), strict=True)
                yield from ((name, raw) for name, raw in texts if raw is not None)
            self.identity.check_list(tenant)

    def task_count(self, tenant: str) -> int:
        """How many tasks the tenant has."""
        with guarded():
            return int(self._client.scard(TenantKeys(tenant).tasks))

    def total(self, tenant: str) -> tuple[str, tuple[int, int, int] | None]:
        """The last change, and the tenant's tasks, versions and bytes after it, None where nobody has counted."""
        keys = TenantKeys(tenant)
        with guarded():
            last, *total = self._total(keys=[keys.audit, keys.total])
        if not total:
            return last.decode(), None
        tasks, versions, size = (int(count) for count in total)
        return last.decode(), (tasks, versions, size)

    def note_total(self, tenant: str, last: str, tasks: int, versions: int, size: int) -> bool:
        """Keep the total as of the change ``last``; False if that is no longer the last one."""
        keys = TenantKeys(tenant)
        with guarded():
            noted = self._note_total(
                keys=[keys.id, keys.audit, keys.total], args=[self.id, last, tasks, versions, size]
            )
        return bool(noted)

    def deleted(self, tenant: str) -> dict[str, bytes]:
        """The JSON of every deleted task, by ``deleted.deleted_key``."""
        with guarded():
            texts = self._client.hgetall(TenantKeys(tenant).deleted)
            self.identity.check_list(tenant)
        return {key.decode(): raw for key, raw in texts.items()}

    def audit(self, tenant: str, limit: int) -> list[dict[bytes, bytes]]:
        """The fields of the last ``limit`` audit entries, the latest first."""
        with guarded():
            entries = self._client.xrevrange(TenantKeys(tenant).audit, count=limit)
            self.identity.check_list(tenant)
        return [fields for _, fields in entries]

    def is_named(self, tenant: str, version: str) -> bool:
        """Whether a task of the tenant has the version; deleted tasks count."""
        with guarded():
            named = bool(self._client.exists(TenantKeys(tenant).names(version)))
            self.identity.check_tenant(tenant)
            if not named:
                self.identity.check()  # as in ``task``
        return named

    def blob(self, tenant: str, version: str) -> bytes | None:
        """An artifact, None where it is not stored."""
        return self._blobs.read(tenant, version)

    def stored_versions(self, tenant: str) -> list[str]:
        """Versions whose artifact is stored, whether a task has them or not."""
        with guarded():
            return sorted(name.decode() for name in self._client.smembers(TenantKeys(tenant).blobs))

    # --- writing ---

    def lease(self, tenant: str, version: str, publisher: str, seconds: float) -> bool:
        """Keep the clean-up away from an artifact for a while; False where the tenant's data is not this registry's."""
        keys = TenantKeys(tenant)
        with guarded():
            leased = self._lease(
                keys=[keys.id, keys.lease(version), keys.blobs], args=[self.id, publisher, int(seconds * 1000), version]
            )
        return bool(leased)

    def release(self, tenant: str, versions: Iterable[str], publisher: str) -> None:
        """Give leases back. A lease that cannot be given back ends by itself."""
        keys = TenantKeys(tenant)
        with suppress(*FAILURES):
            for version in versions:
                self._client.zrem(keys.lease(version), publisher)

    def write_blob(self, tenant: str, version: str, data: bytes) -> None:
        """Store an artifact."""
        self._blobs.write(tenant, version, data)

    def begin(self, tenant: str, name: str) -> tuple[int, bytes | None]:
        """The server's clock in milliseconds, and the task's JSON. Raises RegistryUnavailable for lost data."""
        keys = TenantKeys(tenant)
        with guarded():
            clock_ms, found, raw = self._begin(keys=[keys.id, keys.task(name)])
            self.identity.check_found(tenant, found)
            self.identity.check()  # nothing may change during a restore, not even what is restored already
        return int(clock_ms), raw

    def commit(
        self,
        keys: Sequence[str],
        *,
        latest_ms: int,
        planned_on: str,
        needed_deleted: str,
        operations: str,
        needed_keys: Sequence[int],
        channel: str,
        message: str,
        added: Sequence[int],
        limits: Sequence[int] | None,
    ) -> str:
        """Run ``scripts.COMMIT``: "made", "again", "gone", "late", "missing" or "foreign"."""
        if self._is_cluster:
            channel = ""
        numbers = json.dumps(list(needed_keys))
        with guarded():
            outcome = self._commit(
                keys=list(keys),
                args=[
                    self.id, latest_ms, planned_on, needed_deleted, operations, numbers, channel, message,
                    json.dumps(list(added)), json.dumps(list(limits)) if limits is not None else "",
                ],
            )  # fmt: skip
        return bytes(outcome).decode()

    def replace_audit(self, tenant: str, entries: Sequence[Sequence[str]]) -> None:
        """Make the tenant's audit these: the fields of each entry, the oldest first."""
        keys = TenantKeys(tenant)
        with guarded():
            made = self._replace_audit(keys=[keys.id, keys.audit], args=[self.id, AUDIT_KEPT, json.dumps(entries)])
        if not made:
            raise self.identity.lost()

    def collect(self, tenant: str, version: str, *, remove: bool) -> int:
        """Run ``scripts.COLLECT``: the artifact's bytes, -1 where a task or a lease keeps it."""
        keys = TenantKeys(tenant)
        with guarded():
            size = self._collect(
                keys=[keys.blob(version), keys.names(version), keys.lease(version), keys.blobs, keys.id],
                args=[version, "1" if remove else "0", self.id],
            )
        return int(size)
