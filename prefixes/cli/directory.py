"""Where ``prefixd keys`` and ``prefixd tenants`` work: a registry itself, or a running server.

Owns the choice, and gives both the same form: the JSON that a server answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from prefixes.actor import local_actor
from prefixes.cli.key_option import key_of_command
from prefixes.cli.target import place_of, telling
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.remote_directory import RemoteDirectory
from prefixes.spec import DEFAULT_TENANT
from prefixes.tenancy.changes import key_of
from prefixes.tenancy.directory import Directory, NewKey
from prefixes.tenancy.model import Share
from prefixes.tenancy.records import key_to_dict, share_to_dict, tenant_to_dict


class LocalDirectory:
    """A registry's own tenants and keys, with ``RemoteDirectory``'s methods: who has the registry is its operator."""

    def __init__(self, store: Store) -> None:
        self._store, self._directory, self._actor = store, Directory(store.tenancy), local_actor()

    def tenants(self) -> list[dict[str, Any]]:
        state = self._directory.load()
        return [tenant_to_dict(state, state.tenants[name]) for name in sorted(state.tenants)]

    def create_tenant(self, name: str) -> dict[str, Any]:
        made = self._directory.create_tenant(name, actor=self._actor)
        return tenant_to_dict(self._directory.load(), made)

    def block(self, name: str, blocked: bool) -> dict[str, Any]:
        tenant = self._directory.block(name, blocked, actor=self._actor)
        return tenant_to_dict(self._directory.load(), tenant)

    def set_weight(self, name: str, weight: float) -> dict[str, Any]:
        tenant = self._directory.set_weight(name, weight, actor=self._actor)
        return tenant_to_dict(self._directory.load(), tenant)

    def keys(self, tenant: str | None) -> list[dict[str, Any]]:
        used = self._directory.used()
        return [key_to_dict(key, used) for key in self._directory.load().keys_of(tenant)]

    def key(self, key_id: str) -> dict[str, Any]:
        return key_to_dict(key_of(self._directory.load(), key_id), self._directory.used())

    def create_key(
        self, tenant: str | None, name: str, scopes: Iterable[str], expires_at: str | None
    ) -> dict[str, Any]:
        return _with_secret(
            self._directory.create_key(
                tenant or DEFAULT_TENANT, name, scopes, expires_at=expires_at, actor=self._actor
            )
        )

    def rotate(self, key_id: str, grace_s: float) -> dict[str, Any]:
        return _with_secret(self._directory.rotate(key_id, grace_s=grace_s, actor=self._actor))

    def revoke(self, key_id: str) -> dict[str, Any]:
        return key_to_dict(self._directory.revoke(key_id, actor=self._actor), self._directory.used())

    def share(
        self, tenant: str, name: str, *, everyone: bool, tenants: Iterable[str], download: bool
    ) -> dict[str, Any]:
        wanted = Share(everyone, frozenset(tenants), download)
        if not wanted.private:  # a share stays when its task is deleted, and can be ended then
            self._store.inspect(tenant, name)
        return share_to_dict(self._directory.share(f"{tenant}/{name}", wanted, actor=self._actor))


@contextmanager
def opened_directory(
    registry: str | None, server: str | None, *, create: bool = False
) -> Iterator[LocalDirectory | RemoteDirectory]:
    """The directory of the registry or the server that the options or the environment name."""
    registry, server = place_of(registry, server)
    if server is not None:
        with closing(RemoteDirectory(server, api_key=key_of_command())) as remote:
            yield remote
        return
    with telling(registry) as url, closing(open_registry(url, create=create)) as store:
        yield LocalDirectory(store)


def _with_secret(made: NewKey) -> dict[str, Any]:
    return {**key_to_dict(made.key, {}), "secret": made.secret}
