"""Answers: compact UTF-8 JSON without NaN, and metrics as Prometheus asks for them. Knows no body's content."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import anyio.to_thread
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

METRICS_CONTENT: Final = {
    kind: {"type": "string"} for kind in ("text/plain", "application/openmetrics-text")
}
"""For the document: what ``metrics_response`` answers."""
_VERSIONS: Final = re.compile(r"version=\s*([^;,]*)")
_VERSION: Final = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){0,3}\s*")
_encode: Final[Callable[[Any], str]] = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False
).encode


def to_json(body: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return _encode(body).encode()


def json_response(body: Any, status: int = 200) -> Response:
    """An answer with ``body`` as its JSON."""
    return Response(to_json(body), status_code=status, media_type="application/json")


async def metrics_response(request: Request, metrics: CollectorRegistry) -> Response:
    """``metrics`` in the text format that the Accept header asks for; in the plain one where no version is meant."""
    accept = request.headers.get("accept", "")
    known = all(_VERSION.fullmatch(version) for version in _VERSIONS.findall(accept))
    encode, content_type = choose_encoder(accept if known else "")
    body = await anyio.to_thread.run_sync(encode, metrics)
    return Response(body, headers={"content-type": content_type})
