"""RedisIdentity: whose data Redis holds: the registry's id, its tenants, and the id again beside each tenant's data.

Owns these keys and every check of them. A listed tenant without an id has lost its data, for example with a node of a
Cluster; a tenant that is not listed is new. A tenant listed after a loss of the registry would count as lost when the
registry is back, so one step lists a tenant and checks the registry's id. During a restore a mark beside a tenant's id
says that the tenant may be incomplete.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from prefixes.errors import RegistryMissing, WrongRegistry
from prefixes.registry.identity import Mark, check_id, mark_from_json, mark_to_json
from prefixes.registry.redis.errors import guarded
from prefixes.registry.redis.keys import EVERY_TENANTS_ID, REGISTRY, TENANTS, TenantKeys
from prefixes.registry.redis.scripts import ENLIST, RESTORE

if TYPE_CHECKING:
    import redis
    from redis.cluster import RedisCluster

_CHUNK: Final = 1000  # tenants asked for by one pipeline


class RedisIdentity:
    """``id`` is the registry's; see ``base.Store`` for ``restoring``."""

    def __init__(
        self, client: redis.Redis | RedisCluster, *, create: bool, registry_id: str | None, restoring: bool
    ) -> None:
        """See ``open_registry``."""
        self._client = client
        self._enlist, self._restore = client.register_script(ENLIST), client.register_script(RESTORE)
        self.restoring = restoring
        if create:
            with guarded():
                client.set(REGISTRY, mark_to_json(Mark(registry_id or uuid.uuid4().hex, restoring)), nx=True)
        self.id = self._read().id
        check_id(self.id, registry_id)

    def check(self) -> None:
        """Raise RegistryUnavailable unless the registry is there, and still the one that was opened."""
        self.check_mark(self._read())

    def check_mark(self, mark: Mark) -> Mark:
        """``mark``, if it is this registry's. Raises WrongRegistry."""
        if mark.id != self.id:
            raise self.lost()
        return mark

    def check_tenant(self, tenant: str) -> None:
        """As ``check_found``. Call it after a read of several steps: data may be lost in between."""
        self.check_found(tenant, self._client.get(TenantKeys(tenant).id))

    def check_list(self, tenant: str) -> None:
        """As ``check_tenant``, after a list. Raises RegistryRestoring during a restore: a list may be incomplete."""
        self.check_tenant(tenant)
        self.check()

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
            if self.restoring:  # before the id, which alone would say that the tenant is complete
                self._client.set(TenantKeys(tenant).unfinished, 1)
            if found is None:
                self._client.set(key, self.id, nx=True)
            if not self._list(tenant):  # the data was lost just before; the tenant looked new
                self.check()
                raise self.lost()

    def tenants(self) -> list[str]:
        """Every tenant that ever published, sorted."""
        with guarded():
            names = self._client.smembers(TENANTS)
            self.check()
        return sorted(name.decode() for name in names)

    def lost(self) -> WrongRegistry:
        """The error for data that was lost or is another registry's."""
        return WrongRegistry("registry: Redis has lost its data, or holds another registry; restore it")

    # --- restoring ---

    def lost_tenants(self) -> list[str]:
        """Tenants that are listed and have no id, sorted."""
        names = self.tenants()
        found = self._ask(names, lambda batch, keys: batch.get(keys.id))
        return [name for name, (registry_id,) in zip(names, found, strict=True) if registry_id is None]

    def kept_tenants(self) -> frozenset[str]:
        """See ``base.Store``. A tenant with the mark may be incomplete."""
        return frozenset(name for name, unfinished in self._present().items() if not unfinished)

    def begin_restoring(self) -> None:
        """See ``base.Store``. Lists tenants again whose data is there and whose list was lost with another node."""
        self._become(restoring=True)
        with guarded():
            for tenant in self._present():
                self._list(tenant)
        self.check()

    def finish_restoring(self, forget: Sequence[str]) -> None:
        """See ``base.Store``."""
        self._ask(self.tenants(), lambda batch, keys: batch.delete(keys.unfinished))
        self._become(restoring=False, forget=forget)
        self.restoring = False

    def _become(self, *, restoring: bool, forget: Sequence[str] = ()) -> None:
        with guarded():
            made = self._restore(
                keys=[REGISTRY, TENANTS],
                args=[self.id, "1" if restoring else "0", json.dumps(list(forget))],
            )
        if not made:
            self.check()
            raise self.lost()

    def _present(self) -> dict[str, bool]:
        """Tenants that have data of this registry, and whether they have the mark.

        They are found by their ids. A tenant with an id and no audit is left out: the id was written after a loss.
        """
        with guarded():
            found = list(self._client.scan_iter(match=EVERY_TENANTS_ID, count=1000))
        names = sorted({TenantKeys.tenant_of(key.decode()) for key in found})
        answers = self._ask(names, lambda batch, keys: batch.get(keys.id).exists(keys.audit).exists(keys.unfinished))
        return {
            name: bool(unfinished)
            for name, (registry_id, changed, unfinished) in zip(names, answers, strict=True)
            if registry_id is not None and registry_id.decode() == self.id and changed
        }

    def _ask(self, names: Sequence[str], ask: Callable[[Any, TenantKeys], object]) -> list[list[Any]]:
        """The answers for each tenant, by pipelines without a transaction: on a Cluster tenants lie in many slots."""
        answers: list[list[Any]] = []
        with guarded():
            for begin in range(0, len(names), _CHUNK):
                chunk = names[begin : begin + _CHUNK]
                with self._client.pipeline(transaction=False) as batch:
                    for name in chunk:
                        ask(batch, TenantKeys(name))
                    found = batch.execute()
                each = len(found) // len(chunk)
                answers += [found[at : at + each] for at in range(0, len(found), each)]
        return answers

    # --- reading ---

    def _list(self, tenant: str) -> bool:
        return bool(self._enlist(keys=[REGISTRY, TENANTS], args=[self.id, tenant]))

    def _read(self) -> Mark:
        with guarded():
            raw = self._client.get(REGISTRY)
        return self.parse(raw)

    def parse(self, raw: bytes | None) -> Mark:
        """What Redis has of the registry. Raises RegistryMissing where there is none, and as ``mark_from_json``."""
        if raw is None:
            raise RegistryMissing("registry: expected a registry in Redis, found none: it is empty, or was emptied")
        return mark_from_json(raw, restoring=self.restoring)

    def _check_unknown(self, tenant: str) -> None:
        self.check()
        if not self.restoring and self._client.sismember(TENANTS, tenant):
            found = self._client.get(TenantKeys(tenant).id)  # another writer may have entered it meanwhile
            if found is None or found.decode() != self.id:
                raise self.lost()
