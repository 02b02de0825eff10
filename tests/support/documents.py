"""What a test asks of an application's OpenAPI document. Knows no service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Match

from server.web.error_handlers import METHODS
from server.web.errors import STATUSES, openai_status

EVERYWHERE = {"internal", "shutting_down"}
WITH_A_BODY = {"invalid_request", "body_too_large", "timeout", "overloaded"}


def check_document(app: FastAPI, samples: dict[str, str]) -> None:
    """The document names each route's methods and no other, and says what each answers. ``samples`` fill the paths."""
    document = app.openapi()
    assert "HTTPValidationError" not in json.dumps(document)
    assert "x-setting" not in json.dumps(document)
    for path, operations in document["paths"].items():
        taken = {method.lower() for method in METHODS if answered(app, method, path.format_map(samples))}
        assert taken == operations.keys(), path
        for method, operation in operations.items():
            check_operation(f"{method} {path}", operation, openai=path.startswith("/v1/"))
    assert set(routes(app)) == document["paths"].keys()


def check_operation(label: str, operation: dict[str, Any], *, openai: bool) -> None:
    """It has a schema for each success, every answer of the middleware, and each code at its own status."""
    codes = set()
    for number, response in operation["responses"].items():
        assert "X-Request-Id" in response["headers"], label
        schemas = [content["schema"] for content in response.get("content", {}).values()]
        if number.startswith("2"):
            assert all(schemas) and (schemas or number == "204"), f"{label}: {number} has no schema"
            continue
        (schema,) = schemas
        named = set(schema["allOf"][1]["properties"]["error"]["properties"]["code"]["enum"])
        codes |= named
        for code in named:
            assert int(number) == (openai_status(STATUSES[code]) if openai else STATUSES[code]), f"{label}: {code}"
        assert (number in ("429", "503")) == ("Retry-After" in response["headers"]), label
    assert codes >= EVERYWHERE, f"{label}: expected answers(…) as its responses"
    if "requestBody" in operation:
        assert codes >= WITH_A_BODY, label
    if any(one.get("in") == "query" for one in operation["parameters"]):
        assert "invalid_request" in codes or "invalid_name" in codes, label


def answered(app: FastAPI, method: str, path: str) -> bool:
    """Whether a route takes ``method`` at ``path``."""
    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "root_path": ""}
    return any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)


def routes(app: FastAPI) -> Iterator[str]:
    """The path of each route that is to be documented."""
    for context in iter_route_contexts(app.routes):
        if getattr(context, "include_in_schema", False):
            yield str(context.path).replace(":path}", "}")
