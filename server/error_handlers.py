"""What FastAPI and Starlette raise, turned into our named errors and answered in the route's own form.

Owns the translation of validation errors: each names its field, and an unknown field gets a guess. Quotes no values:
they may be prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from prefixes.errors import PrefixdError
from server.errors import InvalidRequest, MethodNotAllowed, NotFound, error_response, internal_error
from server.middleware import OPENAI_PATHS
from server.openai_schemas import CompletionRequest
from server.schemas import BatchRequest, GenerateRequest, Parameters, PromoteRequest, RollbackRequest
from server.settings_sources import did_you_mean

MAX_PROBLEMS: Final = 16
_log = logging.getLogger("prefixd.http")

_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "parameters": frozenset(Parameters.model_fields),
    "/generate": frozenset(GenerateRequest.model_fields) | frozenset(Parameters.model_fields),
    "/generate/batch": frozenset(BatchRequest.model_fields) | frozenset(GenerateRequest.model_fields),
    "/v1/completions": frozenset(CompletionRequest.model_fields),
    "/promote": frozenset(PromoteRequest.model_fields) | frozenset(RollbackRequest.model_fields),
}


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of ``app`` in our form, or in OpenAI's under ``/v1``."""
    app.add_exception_handler(PrefixdError, _named)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


def explain(problems: Iterable[Mapping[str, Any]], known: Iterable[str]) -> InvalidRequest:
    """Pydantic's problems as one error; ``known`` are the names to guess from."""
    names = set(known)
    listed = [_problem(problem, names) for problem in list(problems)[:MAX_PROBLEMS]]
    field = listed[0]["field"] if listed else ""
    message = "; ".join(": ".join(filter(None, (entry["field"], entry["problem"]))) for entry in listed)
    return InvalidRequest(message, problems=listed, **({"parameter": field} if field else {}))


def item_problems(error: Any) -> InvalidRequest:
    """As ``explain``, for one item of a batch and its ``pydantic.ValidationError``."""
    return explain(error.errors(include_url=False, include_input=False, include_context=False), _FIELDS["/generate"])


def _problem(problem: Mapping[str, Any], names: set[str]) -> dict[str, str]:
    where = [str(part)[:80] for part in problem["loc"] if part not in ("body", "query", "path")]
    if problem["type"] == "json_invalid":
        return {"field": "", "problem": "body: expected JSON"}
    if problem["type"] == "extra_forbidden":
        within = _FIELDS["parameters"] if "parameters" in where[:-1] else names
        return {"field": ".".join(where), "problem": f"unknown field{did_you_mean(where[-1], within)}"}
    return {"field": ".".join(where) or "body", "problem": str(problem["msg"])}


async def _named(request: Request, error: Exception) -> Response:
    assert isinstance(error, PrefixdError)
    return _answer(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    path = request.url.path
    known = _FIELDS.get(path) or _FIELDS["/promote"]
    return _answer(request, explain(error.errors(), known))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        return _answer(request, NotFound(f"no route {path}", path=path))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        response = _answer(
            request, MethodNotAllowed(f"{path}: expected {allowed}, got {request.method}", expected=allowed)
        )
        response.headers["allow"] = allowed
        return response
    if error.status_code < 500:
        return _answer(request, InvalidRequest(f"request: {error.detail}"))
    _log.error("unexpected HTTP error", exc_info=error)
    return _answer(request, internal_error())


def _answer(request: Request, error: PrefixdError) -> Response:
    request_id = getattr(request.state, "request_id", None)
    return error_response(error, request_id, openai=request.url.path.startswith(OPENAI_PATHS))
