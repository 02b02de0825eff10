"""The web layer without an engine: bodies' limits, request ids, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, generate_latest

from prefixes.errors import PrefixdError, QueueFull, TaskNotFound
from server.request_fields import FIELDS
from server.schemas import GenerateRequest
from server.web.bodies import BodyMiddleware
from server.web.denials import DenialLog
from server.web.error_handlers import install_error_handlers
from server.web.errors import STATUSES, error_body, error_response, openai_error_body
from server.web.http_metrics import HttpMetrics
from server.web.intake import Intake
from server.web.middleware import RequestMiddleware

JSON = {"content-type": "application/json"}


def make_app(registry: CollectorRegistry | None = None) -> FastAPI:
    app = FastAPI()

    @app.post("/generate")
    async def generate(body: GenerateRequest) -> dict[str, Any]:
        return body.parameters.given()

    @app.post("/prefixes")
    async def read(request: Request) -> int:
        return len(await request.body())

    @app.get("/broken/{name}")
    async def broken(name: str) -> None:
        raise RuntimeError(f"the secret is {name}")

    @app.get("/v1/missing")
    async def missing() -> None:
        raise TaskNotFound("no such task", parameter="model")

    install_error_handlers(app, FIELDS)
    intake = Intake(body_timeout_s=60, max_unfinished_bytes=1 << 20)
    app.add_middleware(
        BodyMiddleware, intake=intake, max_bytes=100, uploads={"/prefixes": 1000}, upload_timeout_s=600
    )
    counted = HttpMetrics(registry or CollectorRegistry())
    denials = DenialLog(Mock())
    app.add_middleware(RequestMiddleware, intake=intake, metrics=counted, access_log=False, denials=denials)
    return app


def call(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(run())


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


def test_a_well_formed_request_id_comes_back_and_another_is_replaced() -> None:
    app = make_app()
    assert call(app, "GET", "/nowhere", headers={"x-request-id": "a-1.b_2"}).headers["x-request-id"] == "a-1.b_2"
    for bad in (b"", b"a b", "ä".encode(), b"x" * 129, b"a\tb"):
        response = call(app, "GET", "/nowhere", headers={"x-request-id": bad})
        assert len(response.headers["x-request-id"]) == 32
        assert error_of(response)["request_id"] == response.headers["x-request-id"]


def test_an_unknown_field_is_named_with_a_guess() -> None:
    response = call(make_app(), "POST", "/generate", json={"input": "x", "parameters": {"temprature": 1}})
    assert response.status_code == 422
    assert error_of(response)["code"] == "invalid_request"
    assert error_of(response)["message"] == "parameters.temprature: unknown field; did you mean temperature?"


@pytest.mark.parametrize(
    "body",
    [
        {"input": 3},
        {"input": "x", "parameters": {"max_new_tokens": "3"}},
        {"input": "x", "parameters": {"max_new_tokens": 3.5}},
        {"input": "x", "parameters": {"max_new_tokens": True}},
        {"input": "x", "parameters": {"top_k": 1 << 40}},
        {"input": "x", "parameters": {"do_sample": 1}},
        {"input": "x", "parameters": {"early_stopping": "always"}},
        {"input": "x", "parameters": {"seed": -1}},
        {"input": "x", "stream": "yes"},
        {"input": "x", "task": 7},
        [],
        "text",
        None,
    ],
)
def test_types_are_strict(body: Any) -> None:
    response = call(make_app(), "POST", "/generate", content=json.dumps(body), headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (422, "invalid_request")


def test_a_refusal_does_not_quote_the_input() -> None:
    response = call(make_app(), "POST", "/generate", json={"input": ["my secret"], "stream": "my secret"})
    assert response.status_code == 422
    assert "my secret" not in response.text


@pytest.mark.parametrize("text", ['{"input": "x", "parameters": {"temperature": NaN}}', "{", '"\\ud800', "[" * 50])
def test_what_is_no_json_or_no_number_is_refused(text: str) -> None:
    response = call(make_app(), "POST", "/generate", content=text, headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (422, "invalid_request")


def test_null_parameters_are_parameters_left_out_and_one_stop_string_is_a_list() -> None:
    body = {"input": "x", "parameters": {"temperature": None, "top_k": 3, "stop": "."}}
    assert call(make_app(), "POST", "/generate", json=body).json() == {"top_k": 3, "stop": ["."]}


def test_unknown_routes_and_methods_have_codes() -> None:
    app = make_app()
    response = call(app, "GET", "/nowhere")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    response = call(app, "GET", "/generate")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_an_unexpected_exception_is_internal_and_keeps_its_text_to_itself() -> None:
    response = call(make_app(), "GET", "/broken/hunter2")
    assert (response.status_code, error_of(response)["code"]) == (500, "internal")
    assert "hunter2" not in response.text


def test_under_v1_errors_have_openais_form() -> None:
    response = call(make_app(), "GET", "/v1/missing")
    assert response.status_code == 404
    assert error_of(response) == {
        "message": "no such task", "type": "invalid_request_error", "param": "model", "code": "task_not_found",
    }


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("path", "limit"), [("/generate", 100), ("/prefixes", 1000)])
def test_a_body_beyond_its_limit_is_413(path: str, limit: int, chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(limit // 10 + 1):
            yield b"0123456789"

    content = pieces() if chunked else b"x" * (limit + 1)
    response = call(make_app(), "POST", path, content=content, headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
    assert error_of(response)["detail"]["expected"] == limit


def test_a_body_at_its_limit_passes() -> None:
    assert call(make_app(), "POST", "/prefixes", content=b"x" * 1000).json() == 1000


def test_http_requests_are_counted_by_route_template_and_status() -> None:
    registry = CollectorRegistry()
    app = make_app(registry)
    call(app, "GET", "/broken/one")
    call(app, "GET", "/broken/two")
    call(app, "GET", "/nowhere/at/all")
    text = generate_latest(registry).decode()
    assert 'prefixd_http_requests_total{limit_of="",method="GET",route="/broken/{name}",status="500"} 2.0' in text
    assert 'prefixd_http_requests_total{limit_of="",method="GET",route="(none)",status="404"} 1.0' in text
    assert "nowhere" not in text


def subclasses(kind: type[PrefixdError]) -> set[type[PrefixdError]]:
    return {kind}.union(*(subclasses(sub) for sub in kind.__subclasses__()))


def test_every_named_error_of_a_request_has_a_status() -> None:
    at_start_only = {"invalid_settings", "cannot_listen"}
    ours = {kind for kind in subclasses(PrefixdError) if kind.__module__.split(".")[0] in ("prefixes", "server")}
    assert {kind.code for kind in ours} - at_start_only <= STATUSES.keys()


def test_an_error_can_carry_anything_and_is_sent_as_json() -> None:
    error = PrefixdError("lone \ud800", values=(float("nan"), {"a": {1}}, object))
    body = json.loads(bytes(error_response(error, "id").body))["error"]
    assert body["message"] == "lone \ud800"
    assert body["detail"]["values"][:2] == ["nan", {"a": [1]}]
    assert error_body(error, None)["code"] == openai_error_body(error)["code"] == "internal"


def test_queue_full_says_when_to_come_back() -> None:
    response = error_response(QueueFull("full", retry_after_s=2.2), None)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
