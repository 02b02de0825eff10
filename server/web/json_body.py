"""Reads JSON bodies. A body with more values than any honest one is refused before it is parsed.

Owns that bound. The parser and the validation of what it made keep the interpreter's lock, for seconds with the
millions of values that a few megabytes can hold, and nobody else is served meanwhile. One long text costs next to
nothing. Knows no route.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final

import anyio.to_thread
from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

MAX_VALUES: Final = 20_000
"""Texts, lists, objects and commas in a body. An item of a batch has some ten to forty."""
SMALL: Final = 16 << 10
"""A body of so many bytes cannot have that many."""

_VALUE: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{,]', re.DOTALL)


class JsonRequest(Request):
    """A request whose JSON is bounded."""

    async def json(self) -> Any:
        """The parsed body. Raises HTTPException for one with too many values, or in another encoding than UTF-8."""
        body = await self.body()
        if (encoding := json.detect_encoding(body)) not in ("utf-8", "utf-8-sig"):
            raise HTTPException(422, f"expected a body in utf-8, got {encoding}")
        if len(body) > SMALL and await anyio.to_thread.run_sync(_has_too_many_values, body):
            most = f"{MAX_VALUES} texts, lists, objects and commas"
            raise HTTPException(422, f"expected at most {most} in the body, got more")
        return await super().json()


class JsonRoute(APIRoute):
    """A route whose handler gets a ``JsonRequest``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return bounded


def _has_too_many_values(body: bytes) -> bool:
    return any(count >= MAX_VALUES for count, _ in enumerate(_VALUE.finditer(body)))
