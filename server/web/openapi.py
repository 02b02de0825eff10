"""OpenAPI documents that are true: what each route answers, made from the error classes that it raises.

``answers`` is the one table behind a route's ``responses=``: statuses and codes come from ``errors.STATUSES``, so that
a document cannot say another status than the server sends. ``DocumentedAPI`` adds what the middleware does to every
route. Knows no route.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fastapi import FastAPI

from prefixes.errors import PrefixdError, RegistryUnavailable, ShuttingDown
from server.web.errors import (
    STATUSES,
    BodyTooLarge,
    Forbidden,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    Unauthorized,
    openai_status,
    retry_helps,
)

Responses = dict[int | str, dict[str, Any]]

EVERYWHERE: Final[tuple[type[PrefixdError], ...]] = (PrefixdError, ShuttingDown)
"""What every route may answer: ``internal``, and that it was cut off by a shutdown."""
KEYED: Final[tuple[type[PrefixdError], ...]] = (Unauthorized, Forbidden, RegistryUnavailable)
"""What a route that needs a key may answer about the key; the last where it cannot be looked up."""
BODY: Final = (InvalidRequest, BodyTooLarge, RequestTimeout, Overloaded)
"""What a route that reads a body may answer before it looks at what the body says."""
ERROR: Final = {
    "type": "object",
    "description": "Every error of ours. `code` is stable; `message` is for people; `detail` has the same facts.",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "detail", "request_id"],
            "additionalProperties": False,
            "properties": {
                "code": {"type": "string", "enum": sorted(STATUSES)},
                "message": {"type": "string"},
                "detail": {"type": "object"},
                "request_id": {"type": "string"},
            },
        }
    },
}
OPENAI_ERROR: Final = {
    "type": "object",
    "description": "An error in OpenAI's form, under /v1. `code` is ours.",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": ["server_error", "rate_limit_error", "invalid_request_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string", "enum": sorted(STATUSES)},
            },
        }
    },
}
REQUEST_ID: Final = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "The answer carries it if it is 1 to 128 of A-Z a-z 0-9 . _ : -, else one of the server's.",
}
HEADERS: Final = {
    "X-Request-Id": {
        "description": "The request's id, for the server's log.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    "Retry-After": {
        "description": "Seconds after which a retry may help.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
}
SECURITY: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key's secret, pfx_…"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
}
BOUNDS: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
VALIDATION: Final = "HTTPValidationError"
"""FastAPI's own error, which ``error_handlers`` puts ours in the place of."""
SETTING: Final = "x-setting"
"""Marks a schema that depends on a setting, by a name of ``DocumentedAPI``'s ``settings``."""


def answers(
    success: Any,
    *errors: type[PrefixdError],
    status: int = 200,
    description: str = "Done.",
    content: Mapping[str, Any] | None = None,
    headers: Mapping[str, Any] | None = None,
    openai: bool = False,
    keyed: bool = True,
) -> Responses:
    """A route's ``responses=``: ``success`` is the type of its JSON, None for none; ``errors`` are what it raises.

    ``content`` has the schemas of further media types. Under ``/v1`` errors have OpenAI's form. Only a route that is
    open to everybody is not ``keyed``.
    """
    told: Responses = {status: {"description": description}}
    if success is not None:
        told[status]["model"] = success
    if content:
        told[status]["content"] = {kind: {"schema": schema} for kind, schema in content.items()}
    if headers:
        told[status]["headers"] = dict(headers)
    by_status: dict[int, set[str]] = {}
    for error in (*errors, *EVERYWHERE, *(KEYED if keyed else ())):
        number = STATUSES[error.code]
        by_status.setdefault(openai_status(number) if openai else number, set()).add(error.code)
    for number, codes in sorted(by_status.items()):
        told[number] = _error(codes, "OpenAIError" if openai else "Error")
    return told


def events(*names: str, numbered: bool = False) -> dict[str, Any]:
    """The ``content`` of a stream whose events have one of ``names``; of one whose events have none."""
    data = {"type": "string", **({"contentMediaType": "application/json"} if names else {})}
    fields = {
        **({"event": {"enum": list(names)}} if names else {}),
        "data": data,
        **({"id": {"type": "string"}} if numbered else {}),
    }
    event = {"type": "object", "required": list(fields), "properties": fields, "additionalProperties": False}
    return {"text/event-stream": {**event, "description": "One event of the stream."}}


def _error(codes: Iterable[str], schema: str) -> dict[str, Any]:
    names = sorted(codes)
    only = {"type": "object", "properties": {"error": {"type": "object", "properties": {"code": {"enum": names}}}}}
    told: dict[str, Any] = {
        "description": " or ".join(f"`{name}`" for name in names),
        "content": {"application/json": {"schema": {"allOf": [{"$ref": f"#/components/schemas/{schema}"}, only]}}},
    }
    if all(map(retry_helps, names)):
        told["headers"] = {"Retry-After": {"$ref": "#/components/headers/Retry-After"}}
    return told


class DocumentedAPI(FastAPI):
    """A FastAPI application whose document says what the middleware does, and this server's own limits."""

    def __init__(self, *, settings: Mapping[str, Mapping[str, Any]], **given: Any) -> None:
        """``settings`` are the keywords that take the place of each ``x-setting``."""
        self._settings = settings
        super().__init__(redirect_slashes=False, **given)

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        document = super().openapi()
        if "Error" not in document.setdefault("components", {}).setdefault("schemas", {}):
            document["components"]["schemas"] |= {"Error": ERROR, "OpenAIError": OPENAI_ERROR}
            for never_sent in (VALIDATION, "ValidationError"):
                document["components"]["schemas"].pop(never_sent, None)
            document["components"]["headers"] = HEADERS
            document["components"]["securitySchemes"] = SECURITY
            document["components"]["parameters"] = {"X-Request-Id": REQUEST_ID}
            for operations in document["paths"].values():
                for operation in operations.values():
                    _complete(operation)
            _fill_in(document, self._settings)
            _share(document["paths"])
        return document


def _complete(operation: dict[str, Any]) -> None:
    if VALIDATION in str(operation["responses"].get("422")):
        del operation["responses"]["422"]
    if "401" in operation["responses"]:
        operation["security"] = [{}, *({name: []} for name in SECURITY)]  # {}: while no key was ever made
    operation.setdefault("parameters", []).append({"$ref": "#/components/parameters/X-Request-Id"})
    for response in operation["responses"].values():
        response.setdefault("headers", {})["X-Request-Id"] = {"$ref": "#/components/headers/X-Request-Id"}


def _fill_in(node: Any, settings: Mapping[str, Mapping[str, Any]]) -> None:
    if isinstance(node, dict):
        if SETTING in node:
            node.update(settings[node.pop(SETTING)])
        for bound in BOUNDS & node.keys():
            if isinstance(node[bound], float) and node[bound].is_integer():
                node[bound] = int(node[bound])  # FastAPI makes floats of them; 2**63 as 9.223372036854776e18 is more
        for inner in node.values():
            _fill_in(inner, settings)
    elif isinstance(node, list):
        for inner in node:
            _fill_in(inner, settings)


def _share(paths: dict[str, dict[str, Any]]) -> None:
    """Add to each path the operations of more general ones.

    By OpenAPI's rule ``/prefixes/acme/promote`` belongs to ``/prefixes/{name}/promote`` alone. The server takes what
    that has not by ``/prefixes/{tenant}/{name}``.
    """
    for special, operations in paths.items():
        for general in paths:
            if not _is_case_of(special, general):
                continue
            given = [one for one in next(iter(operations.values()))["parameters"] if one.get("in") == "path"]
            for method in paths[general].keys() - operations.keys():
                operation = copy.deepcopy(paths[general][method])
                others = [one for one in operation["parameters"] if one.get("in") != "path"]
                operations[method] = {
                    **operation,
                    "parameters": [*given, *others],
                    "operationId": f"{operation['operationId']}_by_{special.rpartition('/')[2]}",
                    "description": f"The case of `{general}` that this path is.",
                }


def _is_case_of(special: str, general: str) -> bool:
    if special == general or special.count("/") != general.count("/"):
        return False
    pairs = zip(special.split("/"), general.split("/"), strict=True)
    return all(theirs.startswith("{") or mine == theirs for mine, theirs in pairs)
