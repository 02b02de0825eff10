"""RedisIdentity: whose data Redis holds: the registry's id, its tenants, and the id again beside each one's data.

Owns the keys that say so and every look at them. A tenant that is listed and has no id has lost its data, with a node
of a Cluster for example; one that is not listed is new. So nothing may be listed behind a loss, where it would pass for
lost once the registry is back: a tenant is listed in one step with the look at the registry's id.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from prefixes.errors import RegistryMissing, WrongRegistry
from prefixes.registry.identity import check_id, registry_from_json, registry_json
from prefixes.registry.redis_errors import guarded
from prefixes.registry.redis_keys import EVERY_TENANTS_ID, REGISTRY, TENANTS, TenantKeys
from prefixes.registry.redis_scripts import ENLIST

if TYPE_CHECKING:
    import redis
    from redis.cluster import RedisCluster

_CHUNK: Final = 1000  # tenants looked at together


class RedisIdentity:
    """``id`` is the registry's; see ``base.Store`` for ``restoring``."""

    def __init__(
        self, client: redis.Redis | RedisCluster, *, create: bool, registry_id: str | None, restoring: bool
    ) -> None:
        """See ``open_registry``."""
        self._client = client
        self._enlist = client.register_script(ENLIST)
        self.restoring = restoring
        if create:
            with guarded():
                client.set(REGISTRY, registry_json(registry_id or uuid.uuid4().hex, restoring), nx=True)
        self.id, self.restoring = self._read()
        check_id(self.id, registry_id)
        if self.restoring:
            self._find_tenants()

    def check(self) -> None:
        """Raise RegistryUnavailable unless the registry is there, and still the one that was opened."""
        if self._read()[0] != self.id:
            raise self.lost()

    def check_tenant(self, tenant: str) -> None:
        """As ``check_found``. After a read of several steps: before it, data lost in between would go unnoticed."""
        self.check_found(tenant, self._client.get(TenantKeys(tenant).id))

    def check_found(self, tenant: str, found: bytes | None) -> None:
        """Return if the id beside the tenant's data is right, or there is no such tenant."""
        if found is None:
            self._check_unknown(tenant)
        elif found.decode() != self.id:
            raise self.lost()

    def enter(self, tenant: str) -> None:
        """Make sure that the tenant is known, with the registry's id beside its data. Raises RegistryUnavailable."""
        key = TenantKeys(tenant).id
        with guarded():
            found = self._client.get(key)
            self.check_found(tenant, found)
            if found is None:
                self._client.set(key, self.id, nx=True)
            if not self._list(tenant):  # data lost just before would have been taken for a tenant that is new
                self.check()
                raise self.lost()

    def tenants(self) -> list[str]:
        """All that ever published, sorted."""
        with guarded():
            names = self._client.smembers(TENANTS)
            self.check()
        return sorted(name.decode() for name in names)

    def lost(self) -> WrongRegistry:
        """The error for data that was lost, or is another registry's."""
        return WrongRegistry("registry: Redis has lost its data, or holds another registry; restore it")

    # --- restoring ---

    def lost_tenants(self) -> list[str]:
        """Those that are listed and have no id, sorted."""
        names = self.tenants()
        lost: list[str] = []
        with guarded():
            for begin in range(0, len(names), _CHUNK):
                chunk = names[begin : begin + _CHUNK]
                with self._client.pipeline(transaction=False) as batch:  # on a Cluster they are in many slots
                    for name in chunk:
                        batch.get(TenantKeys(name).id)
                    lost += [name for name, found in zip(chunk, batch.execute(), strict=True) if found is None]
        return lost

    def begin_restoring(self, *, dry_run: bool) -> None:
        """See ``base.Store``."""
        self.check()
        self.restoring = True
        if not dry_run:
            with guarded():
                self._client.set(REGISTRY, registry_json(self.id, True))

    def finish_restoring(self) -> None:
        """See ``base.Store``."""
        lost = self.lost_tenants()
        with guarded():
            if lost:
                self._client.srem(TENANTS, *lost)
            self._client.set(REGISTRY, registry_json(self.id, False))
        self.restoring = False

    def _find_tenants(self) -> None:
        """List those whose data outlived their list, which was on another node."""
        with guarded():
            for key in self._client.scan_iter(match=EVERY_TENANTS_ID, count=1000):
                found = self._client.get(key)
                if found is not None and found.decode() == self.id:
                    self._list(TenantKeys.tenant_of(key.decode()))

    # --- looking ---

    def _list(self, tenant: str) -> bool:
        return bool(self._enlist(keys=[REGISTRY, TENANTS], args=[self.id, tenant]))

    def _read(self) -> tuple[str, bool]:
        with guarded():
            raw = self._client.get(REGISTRY)
        if raw is None:
            raise RegistryMissing("registry: expected a registry in Redis, found none: it is empty, or was emptied")
        return registry_from_json(raw, restoring=self.restoring)

    def _check_unknown(self, tenant: str) -> None:
        self.check()
        if not self.restoring and self._client.sismember(TENANTS, tenant):
            found = self._client.get(TenantKeys(tenant).id)  # it may have become known since the caller looked
            if found is None or found.decode() != self.id:
                raise self.lost()
