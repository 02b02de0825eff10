"""JSON bodies that cost more than an honest one are refused before they are parsed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.requests import Request

from server.web.error_handlers import install_error_handlers
from server.web.json_body import MAX_VALUES, SMALL, JsonRoute


class Body(BaseModel):
    items: list[Any]


@pytest.fixture
def client() -> Iterator[TestClient]:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/")
    async def count(body: Body) -> dict[str, int]:
        return {"count": len(body.items)}

    app = FastAPI()
    install_error_handlers(app, {})
    app.include_router(router)
    with TestClient(app) as client:
        yield client


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the bodies that were parsed."""
    sizes: list[int] = []
    parse = Request.json

    async def noting(request: Request) -> Any:
        sizes.append(len(await request.body()))
        return await parse(request)

    monkeypatch.setattr(Request, "json", noting)
    return sizes


def send(client: TestClient, content: bytes) -> tuple[int, Any]:
    response = client.post("/", content=content, headers={"content-type": "application/json"})
    return response.status_code, response.json()


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"0,", b'"a",', b'"a" ', b'{"a":0},', b"[" * 40 + b"]" * 40 + b","])
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(
    client: TestClient, parsed: list[int], unit: bytes
) -> None:
    status, body = send(client, b'{"items":[' + unit * (MAX_VALUES + 1) + b"0]}")
    assert (status, body["error"]["code"]) == (422, "invalid_request")
    assert f"at most {MAX_VALUES}" in body["error"]["message"]
    assert parsed == []


def test_values_are_counted_outside_of_texts_alone(client: TestClient, parsed: list[int]) -> None:
    texts = ['[{,"' * MAX_VALUES, '\\"' * MAX_VALUES, "\\", '"', "\n[" * MAX_VALUES]
    content = json.dumps({"items": texts}).encode()
    assert send(client, content) == (200, {"count": len(texts)})
    assert parsed == [len(content)]


def test_as_many_values_as_are_allowed_are_taken(client: TestClient) -> None:
    most = MAX_VALUES - 3  # the object, its key and the list
    assert send(client, json.dumps({"items": [0] * most}).encode()) == (200, {"count": most})
    assert send(client, json.dumps({"items": [0] * (most + 2)}).encode())[0] == 422


def test_a_small_body_cannot_have_too_many() -> None:
    assert SMALL <= MAX_VALUES


def test_a_text_without_an_end_is_looked_through_once(client: TestClient) -> None:
    """Each of its quotes began a search to the body's end: minutes for a megabyte."""
    status, body = send(client, b'{"items":["' + b'\\"' * 500_000)
    assert (status, body["error"]["message"]) == (422, "body: expected JSON")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_another_encoding_is_refused_since_its_values_cannot_be_counted(client: TestClient, encoding: str) -> None:
    status, body = send(client, json.dumps({"items": []}).encode(encoding))
    assert status == 422
    assert "expected a body in utf-8, got utf-" in body["error"]["message"]


def test_a_byte_order_mark_is_taken(client: TestClient) -> None:
    assert send(client, b'\xef\xbb\xbf{"items": [1]}') == (200, {"count": 1})
