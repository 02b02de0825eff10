"""The middleware around every request that has a body, in pure ASGI: no body is too large, too slow or waited for long.

Owns the limits by path and the answer to a body that breaks one. Keeps nothing of a body. It adds one function call
per sent piece, because streams pass through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixes.errors import PrefixdError
from server.web.errors import BodyTooLarge, RequestTimeout
from server.web.intake import Intake
from server.web.middleware import respond

LINGER_S: Final = 2.0
"""How long a refused body is still read and thrown away, so that its sender sees the answer."""
UPLOAD_IN_MEMORY: Final = 2 << 20
"""What reading an upload keeps in memory; the rest is on disk. Eight form fields at their most would keep 8 MiB."""


class BodyMiddleware:
    """Refuses bodies beyond their limit with 413, slow ones with 408, and with 503 what ``intake`` has no room for."""

    def __init__(
        self, app: ASGIApp, *, intake: Intake, max_bytes: int, uploads: Mapping[str, int], upload_timeout_s: float
    ) -> None:
        """``uploads`` maps a path to the limit for what is posted there; ``max_bytes`` is for all else.

        An upload must be whole after ``upload_timeout_s`` seconds.
        """
        self.app = app
        self._intake = intake
        self._max_bytes = max_bytes
        self._uploads = dict(uploads)
        self._upload_timeout_s = upload_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        declared = headers.get("content-length")
        if "transfer-encoding" not in headers:  # it wins if both are sent
            size = int(declared or 0)  # uvicorn has refused what is no number, and holds senders to the number
            limit, _ = self._limits(scope) if size else (0, None)
            if size == 0:
                await self.app(scope, receive, send)
                return
            if size > limit:
                if headers.get("expect", "").lower() != "100-continue":  # one that asks first has sent nothing
                    await _discard(receive, limit)
                await _refuse(_too_large(limit, size), scope, receive, send)
                return
        await self._read(scope, receive, send)

    def _limits(self, scope: Scope) -> tuple[int, int | None]:
        """The most bytes of the body, and the most of them that are kept in memory."""
        if self._is_upload(scope):
            return self._uploads[scope["path"]], UPLOAD_IN_MEMORY
        return self._max_bytes, None

    def _is_upload(self, scope: Scope) -> bool:
        return scope["method"] == "POST" and scope["path"] in self._uploads

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit, most_held = self._limits(scope)
        body = self._intake.begin(most_held, self._upload_timeout_s if self._is_upload(scope) else math.inf)
        scope.setdefault("state", {})["body"] = body  # for ``UploadPlaces``
        refused: PrefixdError | None = None
        whole = answered = False

        async def bounded_receive() -> Message:
            nonlocal refused, whole
            if whole:
                return await receive()
            try:
                message = await body.next(receive)
                if body.got > limit:
                    raise _too_large(limit, body.got)
            except PrefixdError as error:
                if answered:
                    return {"type": "http.disconnect"}
                refused = refused or error
                raise refused from None
            whole = not message.get("more_body", False)
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal answered
            if refused is None:
                answered = True
                await send(message)

        try:
            await self.app(scope, bounded_receive, guarded_send)
        except PrefixdError as error:
            if error is not refused:
                raise
        finally:
            self._intake.forget(body)
        if refused is not None:  # what the application answered was held back
            if not isinstance(refused, RequestTimeout):  # that one sends nothing
                await _discard(receive, limit)
            await _refuse(refused, scope, receive, send)


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


async def _refuse(error: PrefixdError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer ``error``. Who stands still is cut off; who still sends may end, and reads the answer then."""
    await respond(error, scope, receive, send, close=not isinstance(error, BodyTooLarge))
