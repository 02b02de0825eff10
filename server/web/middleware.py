"""The middleware around every request, in pure ASGI: its id, the limit on its body, its metrics, its log line.

Owns what is the same for all routes and knows none of them. It adds only one function call per sent piece of a body,
because streams pass through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixes.errors import PrefixdError
from server.web.errors import BodyTooLarge, error_response, internal_error
from server.web.http_metrics import HttpMetrics
from server.web.logs import current_request_id
from server.web.sse import ClientLeft

REQUEST_ID_HEADER: Final = "x-request-id"
OPENAI_PATHS: Final = "/v1/"
PROBES: Final = frozenset({"/health", "/ready", "/metrics"})
"""Proxies and monitors ask for these several times a second. They are counted on the public port and never logged."""
CLIENT_LEFT: Final = 499
LINGER_S: Final = 2.0
"""How long a refused body is still read and thrown away, so that its sender sees the answer."""

_WELL_FORMED: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger("prefixd.http")


class RequestMiddleware:
    """Gives a request its id (the caller's if well-formed), counts it, logs it and answers uncaught exceptions."""

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics | None, access_log: bool) -> None:
        self.app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _WELL_FORMED.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        current_request_id.set(request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except (ClientLeft, ClientDisconnect):  # the latter from a body that was cut off
            status = CLIENT_LEFT
        except Exception:
            _log.exception("unexpected error")
            if status == 0:
                await _respond(internal_error(), scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", None)
            if self._metrics:
                self._metrics.observe(scope["method"], route, status or CLIENT_LEFT, seconds)
            if self._access_log and route not in PROBES:
                facts = {
                    "method": scope["method"], "route": route, "path": scope["path"][:200],
                    "status": status or CLIENT_LEFT, "seconds": round(seconds, 6),
                }
                _log.info("request", extra={"facts": facts})


class BodyLimitMiddleware:
    """Refuses bodies beyond their limit with 413, by Content-Length or while they stream in. Keeps nothing of them."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, uploads: Mapping[str, int]) -> None:
        """``uploads`` maps a path to the limit for what is posted there; ``max_bytes`` is for all else."""
        self.app = app
        self._max_bytes = max_bytes
        self._uploads = dict(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self._uploads.get(scope["path"], self._max_bytes) if scope["method"] == "POST" else self._max_bytes
        headers = Headers(scope=scope)
        declared = headers.get("content-length")
        if declared is None or "transfer-encoding" in headers:  # the latter wins if both are sent
            await self._count(scope, receive, send, limit)
        elif int(declared) > limit:  # uvicorn has refused what is no number, and holds senders to the number
            await _discard(receive, limit)
            await _respond(_too_large(limit, int(declared)), scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        received = 0
        refused: BodyTooLarge | None = None
        answered = False

        async def counted_receive() -> Message:
            nonlocal received, refused
            message = await receive() if refused is None else {"type": "http.disconnect"}
            received += len(message.get("body", b""))
            if received > limit and refused is None:
                refused = _too_large(limit, received)
                if message.get("more_body", False):
                    await _discard(receive, limit)
            if refused is not None:
                raise refused
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal answered
            if refused is None:
                answered = True
                await send(message)

        with contextlib.suppress(BodyTooLarge):
            await self.app(scope, counted_receive, guarded_send)
        if refused is not None and not answered:  # what the application answered was held back
            await _respond(refused, scope, receive, send)


def _too_large(limit: int, got: int) -> BodyTooLarge:
    return BodyTooLarge(f"body: expected at most {limit} bytes, got {got} or more", expected=limit, got=got)


async def _discard(receive: Receive, most: int) -> None:
    """Read on for a moment. If we close while a sender sends, its kernel throws away the answer before it is read."""
    left = most
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


async def _respond(error: PrefixdError, scope: Scope, receive: Receive, send: Send) -> None:
    request_id = scope.get("state", {}).get("request_id")
    await error_response(error, request_id, openai=scope["path"].startswith(OPENAI_PATHS))(scope, receive, send)
