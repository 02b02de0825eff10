"""Turns what FastAPI and Starlette raise into our named errors, and answers them in the route's own form.

Owns the translation of validation errors: each names its field, and an unknown field gets a guess. Quotes no values,
because they may be prompts. Knows no route.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from prefixes.errors import PrefixdError
from server.web.denials import note_refused
from server.web.errors import (
    REFUSALS,
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    error_response,
    internal_error,
)
from server.web.middleware import OPENAI_PATHS
from server.web.sse import ClientLeft
from server.web.suggest import did_you_mean

MAX_PROBLEMS: Final = 16
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
KnownFields = Mapping[str, frozenset[str]]
"""The names to guess from. A key is a path, the name of an object within a body, or "" for every other path."""

_log = logging.getLogger("prefixd.http")



def install_error_handlers(app: FastAPI, fields: KnownFields) -> None:
    """Answer every error of ``app`` in our form, or in OpenAI's under ``/v1``."""

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _answer(request, explain(error.errors(), fields, request.url.path))

    app.add_exception_handler(PrefixdError, _named)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, _http)


def explain(problems: Iterable[Mapping[str, Any]], fields: KnownFields, path: str) -> InvalidRequest:
    """Pydantic's problems with a body sent to ``path``, as one error."""
    listed = [_problem(problem, fields, path) for problem in list(problems)[:MAX_PROBLEMS]]
    field = listed[0]["field"] if listed else ""
    message = "; ".join(": ".join(filter(None, (entry["field"], entry["problem"]))) for entry in listed)
    return InvalidRequest(message, problems=listed, **({"parameter": field} if field else {}))


def _problem(problem: Mapping[str, Any], fields: KnownFields, path: str) -> dict[str, str]:
    where = [str(part)[:80] for part in problem["loc"] if part not in ("body", "query", "path")]
    if problem["type"] == "json_invalid":
        return {"field": "", "problem": "body: expected JSON"}
    if problem["type"] == "extra_forbidden":
        nested = next((name for name in where[:-1] if name in fields), path)
        within = fields.get(nested, fields.get("", frozenset()))
        return {"field": ".".join(where), "problem": f"unknown field{did_you_mean(where[-1], within)}"}
    return {"field": ".".join(where) or "body", "problem": str(problem["msg"])}


async def _named(request: Request, error: Exception) -> Response:
    assert isinstance(error, PrefixdError)
    return _answer(request, error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):
        raise ClientLeft  # a body that was cut off; FastAPI calls it a bad one
    path = request.url.path[:200]
    if error.status_code == 404:
        return _answer(request, NotFound(f"no route {path}", path=path))
    if error.status_code == 405:
        allowed = _allowed(request)
        response = _answer(
            request, MethodNotAllowed(f"{path}: expected {allowed}, got {request.method}", expected=allowed)
        )
        response.headers["allow"] = allowed
        return response
    if error.status_code < 500:
        return _answer(request, InvalidRequest(f"request: {error.detail}"))
    _log.error("unexpected HTTP error", exc_info=error)
    return _answer(request, internal_error())


def _allowed(request: Request) -> str:
    """Every method of the path. A path may be several routes', and Starlette names the first one's alone."""
    routes = request.app.router.routes
    scopes = ((method, {**request.scope, "method": method}) for method in METHODS)
    return ", ".join(m for m, scope in scopes if any(route.matches(scope)[0] is Match.FULL for route in routes))


def _answer(request: Request, error: PrefixdError) -> Response:
    if error.code in REFUSALS:
        note_refused("", "", error.message if error.code == Forbidden.code else error.code, if_none=True)
    request.state.limit_of = error.detail.get("of")
    request_id = getattr(request.state, "request_id", None)
    return error_response(error, request_id, openai=request.url.path.startswith(OPENAI_PATHS))
