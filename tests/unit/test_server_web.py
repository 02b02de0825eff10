"""The web layer without an engine: bodies' limits, request ids, streams, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, generate_latest
from starlette.types import Message

from prefixes.errors import PrefixdError, QueueFull, TaskNotFound
from server.error_handlers import install_error_handlers
from server.errors import STATUSES, error_body, error_response, openai_error_body
from server.http_metrics import HttpMetrics
from server.middleware import BodyLimitMiddleware, RequestMiddleware
from server.schemas import GenerateRequest
from server.sse import HEARTBEAT, ClientLeft, EventStreamResponse, event, until_disconnect

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

    install_error_handlers(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=100, max_upload_bytes=1000)
    app.add_middleware(RequestMiddleware, metrics=HttpMetrics(registry or CollectorRegistry()), access_log=False)
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
        {"input": "x", "parameters": {"max_new_tokens": 3.0}},
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
    assert 'prefixd_http_requests_total{method="GET",route="/broken/{name}",status="500"} 2.0' in text
    assert 'prefixd_http_requests_total{method="GET",route="(none)",status="404"} 1.0' in text
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


# --- streams ---


class Connection:
    """A client at the other end of an ASGI response; it leaves when ``leave`` is set."""

    def __init__(self) -> None:
        self.sent: list[MutableMapping[str, Any]] = []
        self.leave = asyncio.Event()

    async def receive(self) -> Message:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def run_stream(
    make_body: Callable[[Connection, asyncio.Event], AsyncIterator[bytes]], heartbeat_s: float = 60
) -> tuple[Connection, bool]:
    """Send a stream to its end; returns the connection and whether the work was aborted."""

    async def run() -> tuple[Connection, bool]:
        connection, aborted = Connection(), asyncio.Event()
        response = EventStreamResponse(make_body(connection, aborted), abort=aborted.set, heartbeat_s=heartbeat_s)
        await asyncio.wait_for(response({"type": "http"}, connection.receive, connection.send), 5)
        return connection, aborted.is_set()

    return asyncio.run(run())


def test_a_stream_sends_each_piece_at_once_and_ends_the_body() -> None:
    async def body(connection: Connection, aborted: asyncio.Event) -> AsyncIterator[bytes]:
        yield event("token", b"1")
        assert connection.body == b"event: token\ndata: 1\n\n"
        yield event("done", b"2")

    connection, aborted = run_stream(body)
    assert connection.body == b"event: token\ndata: 1\n\nevent: done\ndata: 2\n\n"
    assert [message.get("more_body") for message in connection.sent[1:]] == [True, True, False]
    assert b"content-length" not in dict(connection.sent[0]["headers"])
    assert not aborted


def test_a_client_that_leaves_aborts_the_work_and_gets_nothing_more() -> None:
    async def body(connection: Connection, aborted: asyncio.Event) -> AsyncIterator[bytes]:
        yield b"first"
        connection.leave.set()
        await aborted.wait()
        yield b"last"

    connection, aborted = run_stream(body)
    assert (connection.body, aborted) == (b"first", True)


def test_a_silent_stream_gets_heartbeats() -> None:
    async def body(connection: Connection, aborted: asyncio.Event) -> AsyncIterator[bytes]:
        while connection.body.count(HEARTBEAT) < 2:
            await asyncio.sleep(0.01)
        yield b"data: x\n\n"

    connection, _ = run_stream(body, heartbeat_s=0.02)
    assert connection.body.startswith(HEARTBEAT * 2)
    assert connection.body.endswith(b"data: x\n\n")


def test_a_stream_that_breaks_aborts_the_work() -> None:
    aborted = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise RuntimeError("broken")

    async def run() -> None:
        connection = Connection()
        response = EventStreamResponse(body(), abort=aborted.set, heartbeat_s=60)
        with pytest.raises(RuntimeError):
            await response({"type": "http"}, connection.receive, connection.send)

    asyncio.run(run())
    assert aborted.is_set()


def until(leave: bool, cancel: bool = False) -> tuple[Any, bool]:
    async def run() -> tuple[Any, bool]:
        connection, aborted = Connection(), asyncio.Event()

        async def work() -> str:
            if leave or cancel:
                await aborted.wait()
            return "whole" if not aborted.is_set() else "partial"

        waiting: Awaitable[Any] = asyncio.ensure_future(until_disconnect(connection.receive, work(), aborted.set))
        await asyncio.sleep(0)
        if leave:
            connection.leave.set()
        if cancel:
            waiting.cancel()  # type: ignore[attr-defined]
            with pytest.raises(asyncio.CancelledError):
                await waiting
            return None, aborted.is_set()
        return await asyncio.wait_for(waiting, 5), aborted.is_set()

    return asyncio.run(run())


def test_a_json_answer_is_aborted_when_its_client_leaves_or_its_task_is_cancelled() -> None:
    assert until(leave=False) == ("whole", False)
    with pytest.raises(ClientLeft):
        until(leave=True)
    assert until(leave=False, cancel=True) == (None, True)
