"""The middleware around every request, in pure ASGI: its id, its metrics, its log line, its denials, its end.

Owns what is the same for all routes and knows none of them. Headers that a request's state has as ``answer_headers`` go
out with its answer, whatever that is; ``limit_of`` there is whose own limit refused it. It adds only one function call
per sent piece of a body, because streams pass through here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixes.errors import PrefixdError, ShuttingDown
from prefixes.tenancy.denial import Denial
from prefixes.tenancy.directory import utc_now
from prefixes.tenancy.secret import PREFIX, without_secrets
from server.web.denials import DenialLog, Refused, begin_notes
from server.web.errors import error_response, internal_error
from server.web.http_metrics import HttpMetrics
from server.web.intake import Intake
from server.web.logs import current_request_id
from server.web.sse import ClientLeft

REQUEST_ID_HEADER: Final = "x-request-id"
OPENAI_PATHS: Final = "/v1/"
PROBES: Final = frozenset({"/health", "/ready", "/metrics"})
"""Proxies and monitors ask for these several times a second. They are counted on the public port and never logged."""
CLIENT_LEFT: Final = 499

_WELL_FORMED: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger("prefixd.http")


class RequestMiddleware:
    """Gives a request its id (the caller's if well-formed), counts it, logs it and answers uncaught exceptions.

    While the process drains each answer ends its connection and says so, so that clients go elsewhere. A request that
    the shutdown cancels is answered like those that came too late.
    """

    def __init__(
        self, app: ASGIApp, *, intake: Intake, metrics: HttpMetrics | None, access_log: bool, denials: DenialLog
    ) -> None:
        self.app = app
        self._intake = intake
        self._metrics = metrics
        self._denials = denials
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _WELL_FORMED.fullmatch(given) and PREFIX not in given else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        current_request_id.set(request_id)
        notes = begin_notes()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                headers.update(scope["state"].get("answer_headers", {}))
                if self._intake.draining:
                    headers["connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except (ClientLeft, ClientDisconnect):  # the latter from a body that was cut off
            status = CLIENT_LEFT
        except asyncio.CancelledError:
            if not self._intake.draining:
                raise
            if status == 0:
                error = ShuttingDown("the process has shut down before the request was done")
                await respond(error, scope, receive, send_with_id)
        except Exception:
            _log.exception("unexpected error")
            if status == 0:
                await respond(internal_error(), scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", None)
            if self._metrics:
                limit_of = scope["state"].get("limit_of")
                self._metrics.observe(scope["method"], route, status or CLIENT_LEFT, limit_of, seconds)
            tenant, key = scope["state"].get("who", (None, None))
            for refused in notes:
                self._audit(scope, refused, tenant if key is not None else None, key)
            if self._access_log and route not in PROBES:
                facts = {
                    "method": scope["method"], "route": route, "path": scope["path"][:200],
                    "status": status or CLIENT_LEFT, "seconds": round(seconds, 6), "tenant": tenant, "key": key,
                }
                _log.info("request", extra={"facts": facts})

    def _audit(self, scope: Scope, refused: Refused, tenant: str | None, key: str | None) -> None:
        request_id, reason = scope["state"]["request_id"], without_secrets(refused.reason)
        try:
            self._denials.note(
                tenant,
                lambda: Denial(utc_now(), key, refused.action, _route(scope), refused.what, reason, request_id),
            )
        except Exception:  # the request is answered, and shall not suffer for it
            _log.exception("a denial was not noted")


def _route(scope: Scope) -> str:
    """The method and the path's template, which names no task. Who is refused early has not come to its route."""
    route = scope.get("route") or _matching(scope["app"].router.routes, scope)
    return f"{scope['method']} {getattr(route, 'path', '(none)')}"


def _matching(routes: Iterable[Any], scope: Scope) -> Any:
    for route in routes:
        included = getattr(route, "original_router", None)  # FastAPI keeps included routers as they are
        if included is not None:
            if found := _matching(included.routes, scope):
                return found
        elif route.matches(scope)[0] is Match.FULL:
            return route
    return None


async def respond(error: PrefixdError, scope: Scope, receive: Receive, send: Send, *, close: bool = False) -> None:
    """Answer ``error`` in the form of the request's path; ``close`` ends the connection."""
    request_id = scope.get("state", {}).get("request_id")
    response = error_response(error, request_id, openai=scope["path"].startswith(OPENAI_PATHS))
    if close:
        response.headers["connection"] = "close"
    await response(scope, receive, send)
