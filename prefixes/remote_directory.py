"""RemoteDirectory: the tenants and keys of a running server, over HTTP.

Owns the caller's side of ``/tenants``, ``/keys`` and a task's share. Answers are the server's JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from prefixes.errors import RegistryUnavailable
from prefixes.remote import Remote


class RemoteDirectory:
    """Raises the server's own errors, by their codes."""

    def __init__(self, url: str, *, api_key: str | None = None, client: httpx.Client | None = None) -> None:
        """``url`` is the server's. Raises RegistryUnavailable for one that is none."""
        self._server = Remote("server", RegistryUnavailable, url, api_key=api_key, client=client)

    def tenants(self) -> list[dict[str, Any]]:
        """Every tenant."""
        return list(self._server.json("GET", "/tenants")["tenants"])

    def tenant(self, name: str) -> dict[str, Any]:
        """One tenant."""
        return dict(self._server.json("GET", f"/tenants/{quote(name, safe='')}"))

    def create_tenant(self, name: str) -> dict[str, Any]:
        """Make a tenant."""
        return dict(self._server.json("POST", "/tenants", json={"name": name}))

    def block(self, name: str, blocked: bool) -> dict[str, Any]:
        """Refuse all its keys, or no longer."""
        return dict(self._server.json("POST", f"/tenants/{quote(name, safe='')}/block", json={"blocked": blocked}))

    def limit_tenant(self, name: str, limits: Mapping[str, int | None], weight: float | None) -> dict[str, Any]:
        """Set limits of it (None unsets one), and its weight if one is given."""
        body = {"limits": dict(limits), **({} if weight is None else {"weight": weight})}
        return dict(self._server.json("POST", f"/tenants/{quote(name, safe='')}/limits", json=body))

    def keys(self, tenant: str | None) -> list[dict[str, Any]]:
        """A tenant's keys, or all that the caller may see."""
        return list(self._server.json("GET", "/keys", params={"tenant": tenant} if tenant else {})["keys"])

    def key(self, key_id: str) -> dict[str, Any]:
        """One key."""
        return dict(self._server.json("GET", f"/keys/{quote(key_id, safe='')}"))

    def create_key(
        self,
        tenant: str | None,
        name: str,
        scopes: Iterable[str],
        expires_at: str | None,
        limits: Mapping[str, int | None],
    ) -> dict[str, Any]:
        """Make a key, of the caller's own tenant if none is named; the answer has its secret."""
        body = {
            "name": name, "scopes": list(scopes), "tenant": tenant, "expires_at": expires_at, "limits": dict(limits)
        }  # fmt: skip
        return dict(self._server.json("POST", "/keys", json=body))

    def limit_key(self, key_id: str, limits: Mapping[str, int | None]) -> dict[str, Any]:
        """Set limits of a key; None unsets one."""
        return dict(self._server.json("POST", f"/keys/{quote(key_id, safe='')}/limits", json={"limits": dict(limits)}))

    def rotate(self, key_id: str, grace_s: float) -> dict[str, Any]:
        """A new secret."""
        return dict(self._server.json("POST", f"/keys/{quote(key_id, safe='')}/rotate", json={"grace_s": grace_s}))

    def revoke(self, key_id: str) -> dict[str, Any]:
        """End a key for good."""
        return dict(self._server.json("DELETE", f"/keys/{quote(key_id, safe='')}"))

    def share(
        self, tenant: str, name: str, *, everyone: bool, tenants: Iterable[str], download: bool
    ) -> dict[str, Any]:
        """Share a task so; with nobody it is private again."""
        body = {"everyone": everyone, "tenants": list(tenants), "download": download}
        return dict(self._server.json("POST", f"/prefixes/{tenant}/{name}/share", json=body))

    def close(self) -> None:
        """Release the connections."""
        self._server.close()
