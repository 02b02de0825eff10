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
from functools import partial
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixes.errors import PrefixdError, RegistryUnavailable
from prefixes.tenancy.directory import utc_now
from prefixes.tenancy.keyring import Keyring, Known
from prefixes.tenancy.model import Key
from prefixes.tenancy.secret import Presented, parse_secret
from server.web.access_settings import AccessSettings
from server.web.auth import ANYBODY, Caller
from server.web.denials import note_refused
from server.web.errors import Forbidden, Unauthorized
from server.web.middleware import respond
from server.web.origins import LOOPBACK_NAMES, check_host, check_not_proxied, check_origin

if TYPE_CHECKING:
    from fastapi import FastAPI

OPEN_PATHS: Final = frozenset({"/health", "/ready"})
"""Anybody may ask for these: load balancers have no key, and address a service by what they like."""
METRICS_PATH: Final = "/metrics"
"""Prometheus addresses services as it likes and has a key. Without keys it is a route like the rest. It takes a key
that is known, by what was last known of it, however long the registry is away. Else the alerts of an outage would end
with the time for which keys work, and the outage itself would look like a service that is gone. It changes nothing, and
only an operator gives the scope for it.
"""
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

    def check_open(self, headers: Headers) -> None:
        """Raise Forbidden for a request that a service without keys does not take."""
        if not self.open_access:
            check_not_proxied(headers)
        if hosts := self.hosts or (() if self.open_access else LOOPBACK_NAMES):
            check_host(headers, hosts)


class Authentication:
    """Puts into the request's state how to judge its ``auth.Caller``; or answers in the app's place.

    ``who`` in the state is tenant and key id, also of a request that is refused: the secret is one that the key has.
    """

    def __init__(self, app: ASGIApp, *, keyring: Keyring, access: Access) -> None:
        self.app = app
        self._keyring, self._access = keyring, access
        self._looking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        try:
            presented = await self._presented(scope["method"], scope["path"], headers)
            outlasts = (scope["method"], scope["path"]) == ("GET", METRICS_PATH)
            if presented:
                await self._look_for(presented, outlasts)
            judge = partial(self._judge, presented, outlasts)
            caller = judge()
            state.update(judge=judge, who=(caller.tenant, caller.key_id))
        except PrefixdError as error:
            state["who"], reason = self._refused(headers)
            if not isinstance(error, RegistryUnavailable):
                note_refused("authenticate", "", error.message if isinstance(error, Forbidden) else reason)
            unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
            await respond(error, scope, receive, send, close=unread)
            return
        await self.app(scope, receive, send)

    async def _presented(self, method: str, path: str, headers: Headers) -> Presented | None:
        """The secret of a request that may be taken, None where nobody needs one."""
        check_origin(method, headers, self._access.origins)
        sent = _sent(headers)
        presented = parse_secret(sent) if sent else None
        if not self._keyring.closed:
            if presented:  # a first key may have been made just now
                await self._look()
            if not self._keyring.closed:
                self._access.check_open(headers)
                return None
        if self._access.hosts and path != METRICS_PATH:
            check_host(headers, self._access.hosts)
        if presented is None:
            raise Unauthorized(_NEEDED)
        return presented

    async def _look_for(self, presented: Presented, outlasts: bool) -> None:
        """Look for a key that may be too new to be known. Raises RegistryUnavailable where nobody can be asked."""
        if self._keyring.find(presented, self._known(outlasts)) or self._keyring.ended(presented):
            return
        await self._look()
        if not self._keyring.find(presented, self._known(outlasts)) and not self._keyring.fresh:
            raise RegistryUnavailable("the key is not known here, and the registry cannot be asked just now")

    def _judge(self, presented: Presented | None, outlasts: bool) -> Caller:
        """The caller with that secret, by what is known now. Raises Unauthorized, Forbidden, RegistryUnavailable."""
        if presented is None and not self._keyring.closed:
            return ANYBODY
        if presented is None:
            raise Unauthorized(_NEEDED)
        known = self._known(outlasts)
        key = self._keyring.find(presented, known)
        if key is None:
            raise Unauthorized(_NEEDED)
        return caller_with(known, key)

    def _known(self, outlasts: bool) -> Known:
        """What a request is judged by. Raises RegistryUnavailable where that is too old for it."""
        return self._keyring.last_known if outlasts else self._keyring.known

    def _refused(self, headers: Headers) -> tuple[tuple[str | None, str | None], str]:
        """Whose key a refused request carries, for log and audit alone, and what is wrong with it."""
        try:
            sent = _sent(headers)
        except Unauthorized:
            return (None, None), "two keys that differ"
        presented = parse_secret(sent) if sent else None
        if presented is None:
            return (None, None), "a malformed key" if sent else "no key"
        key = self._keyring.holder(presented)
        if key is None:
            return (None, None), "an unknown key"
        if key.revoked_at is not None:
            return (key.tenant, key.id), "a revoked key"
        return (key.tenant, key.id), "a replaced secret" if key.works(utc_now()) else "an expired key"

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
