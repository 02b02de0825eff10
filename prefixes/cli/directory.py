"""Where ``prefixd keys`` and ``prefixd tenants`` work: a registry itself, or a running server.

Owns the choice, and gives both the same form: the JSON that a server answers. Says on stderr what a registry's first
key means, which no server can make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, Final

import typer

from prefixes.actor import local_actor
from prefixes.cli.key_option import key_of_command
from prefixes.cli.target import place_of, telling
from prefixes.errors import RegistryUnavailable
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.remote_directory import RemoteDirectory
from prefixes.spec import DEFAULT_TENANT
from prefixes.tenancy.changes import key_of, tenant_of
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.model import Share
from prefixes.tenancy.records import key_to_dict, share_to_dict, tenant_to_dict

_CLOSED: Final = "This is the first key: the registry is closed from now on, and every caller needs a key."
_LEFT: Final = f"The tasks of tenant {DEFAULT_TENANT} stay its own: `--tenant {DEFAULT_TENANT}` makes a key for them."


class LocalDirectory:
    """A registry's own tenants and keys, with ``RemoteDirectory``'s methods: who has the registry is its operator."""

    def __init__(self, store: Store) -> None:
        self._store, self._directory, self._actor = store, Directory(store.tenancy), local_actor()

    def tenants(self) -> list[dict[str, Any]]:
        state = self._directory.load()
        return [tenant_to_dict(state, state.tenants[name]) for name in sorted(state.tenants)]

    def tenant(self, name: str) -> dict[str, Any]:
        state = self._directory.load()
        return tenant_to_dict(state, tenant_of(state, name))

    def create_tenant(self, name: str) -> dict[str, Any]:
        made = self._directory.create_tenant(name, actor=self._actor)
        return tenant_to_dict(self._directory.load(), made)

    def block(self, name: str, blocked: bool) -> dict[str, Any]:
        tenant = self._directory.block(name, blocked, actor=self._actor)
        return tenant_to_dict(self._directory.load(), tenant)

    def limit_tenant(self, name: str, limits: Mapping[str, int | None], weight: float | None) -> dict[str, Any]:
        tenant = self._directory.limit_tenant(name, limits, weight=weight, actor=self._actor)
        return tenant_to_dict(self._directory.load(), tenant)

    def keys(self, tenant: str | None) -> list[dict[str, Any]]:
        state, used = self._directory.load(), self._directory.used()
        return [key_to_dict(state, key, used) for key in state.keys_of(tenant)]

    def key(self, key_id: str) -> dict[str, Any]:
        state = self._directory.load()
        return key_to_dict(state, key_of(state, key_id), self._directory.used())

    def create_key(
        self,
        tenant: str | None,
        name: str,
        scopes: Iterable[str],
        expires_at: str | None,
        limits: Mapping[str, int | None],
    ) -> dict[str, Any]:
        owner, was_open = tenant or DEFAULT_TENANT, not self._directory.closed
        left = was_open and owner != DEFAULT_TENANT and self._may_own_tasks(DEFAULT_TENANT)
        made = self._directory.create_key(
            owner, name, scopes, expires_at=expires_at, limits=limits, actor=self._actor
        )
        if was_open:
            typer.echo(_CLOSED, err=True)
        if left:
            typer.echo(_LEFT, err=True)
        return made.as_dict()

    def _may_own_tasks(self, tenant: str) -> bool:
        try:
            return bool(self._store.tasks(tenant))
        except RegistryUnavailable:  # damaged; that is no reason to leave the registry open
            return True

    def limit_key(self, key_id: str, limits: Mapping[str, int | None]) -> dict[str, Any]:
        key = self._directory.limit_key(key_id, limits, actor=self._actor)
        return key_to_dict(self._directory.load(), key, self._directory.used())

    def rotate(self, key_id: str, grace_s: float) -> dict[str, Any]:
        return self._directory.rotate(key_id, grace_s=grace_s, actor=self._actor).as_dict()

    def revoke(self, key_id: str) -> dict[str, Any]:
        key = self._directory.revoke(key_id, actor=self._actor)
        return key_to_dict(self._directory.load(), key, self._directory.used())

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
