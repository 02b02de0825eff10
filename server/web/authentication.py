"""Authentication: finds out who sends a request, before its body is read, in pure ASGI.

Owns where a key stands in a request, the answer to one that does not work, and when nobody needs one. What a caller
may do is decided in ``auth``. A service is *open* while no key was ever made in its registry; then only this machine
gets in, unless ``--open-access``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixes.errors import PrefixdError, RegistryUnavailable
from prefixes.tenancy.keyring import Keyring, Known
from prefixes.tenancy.model import Key
from prefixes.tenancy.secret import Presented, parse_secret
from server.web.access_settings import AccessSettings
from server.web.auth import ANYBODY, Caller
from server.web.errors import Forbidden, Unauthorized
from server.web.middleware import respond
from server.web.origins import LOOPBACK_NAMES, check_host, check_not_proxied, check_origin

if TYPE_CHECKING:
    from fastapi import FastAPI

OPEN_PATHS: Final = frozenset({"/health", "/ready"})
"""Anybody may ask for these: load balancers have no key, and address a service by what they like."""
MONITORED: Final = frozenset({*OPEN_PATHS, "/metrics"})
PAUSE_S: Final = 0.1
"""Between two looks that requests cause. All who come meanwhile wait for the same one."""
_NEEDED: Final = "expected a key that works, in Authorization: Bearer pfx_… or x-api-key: pfx_…, got none"


@dataclass(frozen=True)
class Access:
    """What a service asks beside keys. ``hosts`` empty: any."""

    open_access: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: AccessSettings) -> Access:
        """As the settings say."""
        return cls(settings.open_access, settings.allowed_hosts, settings.allowed_origins)

    def check_open(self, path: str, headers: Headers) -> None:
        """Raise Forbidden for a request that a service without keys does not take."""
        if path in MONITORED:
            return
        if not self.open_access:
            check_not_proxied(headers)
        if hosts := self.hosts or (() if self.open_access else LOOPBACK_NAMES):
            check_host(headers, hosts)


class Authentication:
    """Puts the ``auth.Caller`` into the request's state, or answers in the application's place."""

    def __init__(self, app: ASGIApp, *, keyring: Keyring, access: Access) -> None:
        self.app = app
        self._keyring, self._access = keyring, access
        self._looking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            scope.setdefault("state", {})["caller"] = await self._caller(scope["method"], scope["path"], headers)
        except PrefixdError as error:
            unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
            await respond(error, scope, receive, send, close=unread)
            return
        await self.app(scope, receive, send)

    async def _caller(self, method: str, path: str, headers: Headers) -> Caller:
        check_origin(method, headers, self._access.origins)
        sent = _sent(headers)
        presented = parse_secret(sent) if sent else None
        if not self._keyring.closed:
            if sent:  # a first key may have been made just now
                await self._look()
            if not self._keyring.closed:
                self._access.check_open(path, headers)
                return ANYBODY
        if self._access.hosts and path not in MONITORED:
            check_host(headers, self._access.hosts)
        if presented is None:
            raise Unauthorized(_NEEDED)
        key = await self._key(presented)
        return caller_with(self._keyring.known, key)

    async def _key(self, presented: Presented) -> Key:
        """The key that the secret opens. Only one that may be too new to be known is looked for."""
        key = self._keyring.find(presented)
        if key is None and not self._keyring.ended(presented):
            await self._look()
            key = self._keyring.find(presented)
            if key is None and not self._keyring.fresh:
                raise RegistryUnavailable("the key is not known here, and the registry cannot be asked just now")
        if key is None:
            raise Unauthorized(_NEEDED)
        return key

    async def _look(self) -> None:
        """Return once the registry was asked after this call began, or could not be asked."""
        since = time.monotonic()
        for _ in range(2):  # a look that is under way may have begun before
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look_soon())
            await asyncio.shield(self._looking)
            if self._keyring.asked_at >= since:
                return

    async def _look_soon(self) -> None:
        await asyncio.sleep(max(0.0, self._keyring.asked_at + PAUSE_S - time.monotonic()))
        await asyncio.to_thread(self._keyring.look)


def caller_with(known: Known, key: Key) -> Caller:
    """The caller whose key is a working one. Raises Forbidden where its tenant is blocked."""
    if known.tenancy.tenants[key.tenant].blocked:
        raise Forbidden(f"tenant {key.tenant} is blocked")
    return Caller(key.tenant, key.id, key.scopes, known.tenancy.shares)


def _sent(headers: Headers) -> str | None:
    """The secret in a request's headers, None where there is none. Raises Unauthorized for several that differ."""
    found: set[str] = set()
    for value in headers.getlist("authorization"):
        kind, _, secret = value.partition(" ")
        found.add(secret.strip() if kind.lower() == "bearer" else "")
    found.update(value.strip() for value in headers.getlist("x-api-key"))
    if len(found) > 1:
        raise Unauthorized(_NEEDED)
    return found.pop() if found else None


def install_access(
    app: FastAPI, keyring: Keyring, settings: AccessSettings, exposed: Sequence[str] = ()
) -> None:
    """Let ``app`` take requests as ``settings`` say: first what browsers ask of other sites, then who it is.

    ``exposed`` are further headers of answers that web pages of allowed origins may read.
    """
    app.add_middleware(Authentication, keyring=keyring, access=Access.of(settings))
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins, allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "x-api-key", "content-type", "x-request-id", "last-event-id"],
            expose_headers=["x-request-id", "retry-after", "x-prefixd-version", *exposed],
        )  # fmt: skip
