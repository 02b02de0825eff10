"""The client against what is no server of ours; tests/e2e has it against the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prefixes.client import RemoteError, RemoteRegistry
from prefixes.errors import Conflict, InvalidName, PrefixdError, RegistryUnavailable, TaskNotFound

VERSION = "sha256:" + "0" * 64


def remote(answer: Callable[[httpx.Request], httpx.Response]) -> RemoteRegistry:
    client = httpx.Client(base_url="http://x", transport=httpx.MockTransport(answer))
    return RemoteRegistry("http://x", client=client)


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"prefixes": "none"}),
        httpx.Response(200, json={"prefixes": [{}]}),
        httpx.Response(200, json={"task": "a/b", "aliases": {"production": VERSION}, "history": {}, "versions": []}),
        httpx.Response(302, headers={"location": "http://elsewhere/"}),
        httpx.Response(502, text="bad gateway"),
        httpx.Response(500, json={"error": "text"}),
    ],
)
def test_answers_of_other_servers_are_registry_unavailable(response: httpx.Response) -> None:
    registry = remote(lambda _: response)
    for call in (registry.tasks, lambda: registry.inspect("a", "b"), lambda: registry.rollback("a", "b")):
        with pytest.raises(RegistryUnavailable, match="the server at http://x"):
            call()


@pytest.mark.parametrize("kind", [TaskNotFound, Conflict, InvalidName])
def test_errors_come_back_as_their_class(kind: type[PrefixdError]) -> None:
    error = {"code": kind.code, "message": "expected a, got b", "detail": {"message": "x"}, "request_id": "1"}
    registry = remote(lambda _: httpx.Response(400, json={"error": error}))
    with pytest.raises(kind, match="expected a, got b") as caught:
        registry.delete("a", "b")
    assert type(caught.value) is kind
    assert caught.value.detail == {"message": "x"}


def test_an_unknown_code_is_kept() -> None:
    error = {"code": "teapot", "message": "short and stout"}
    with pytest.raises(RemoteError, match="short and stout") as caught:
        remote(lambda _: httpx.Response(418, json={"error": error})).check()
    assert caught.value.code == "teapot"
    assert RemoteError("a", "b").code == "a"
    assert PrefixdError.code == "internal"


def test_an_unreachable_server_is_named_without_its_password() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    client = httpx.Client(base_url="http://x", transport=httpx.MockTransport(refuse))
    registry = RemoteRegistry("http://user:secret@x", client=client)
    with pytest.raises(RegistryUnavailable, match="cannot reach the server at http://x: connection refused") as caught:
        registry.check()
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "", "http://", "/x", "http://x:port"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(RegistryUnavailable, match=r"expected http://host"):
        RemoteRegistry(url)


def test_bad_names_never_become_a_path() -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request.url)

    registry = remote(fail)
    calls: list[Callable[[], Any]] = [
        lambda: registry.inspect("..", "x"),
        lambda: registry.delete("a", "b/../c"),
        lambda: registry.download("a", "b", "../x"),
        lambda: registry.fetch("a", "x"),
        lambda: registry.publish("a", "?", b"", record={}),
    ]
    for call in calls:
        with pytest.raises(InvalidName):
            call()


def test_a_publish_key_goes_with_the_upload_and_none_where_there_is_none() -> None:
    """A server that knows no keys refuses the field, rather than publishing twice."""
    sent: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.read())
        return httpx.Response(422, json={"error": {"code": "invalid_request", "message": "once: unknown field"}})

    for key in ("job-1", None):
        with pytest.raises(PrefixdError, match="unknown field"):
            remote(answer).publish("a", "b", b"", record={}, idempotency_key=key)
    assert b'name="once"\r\n\r\njob-1\r\n' in sent[0]
    assert b"once" not in sent[1]
    with pytest.raises(InvalidName):
        remote(answer).publish("a", "b", b"", record={}, idempotency_key="No Key")
    assert len(sent) == 2


def test_the_key_goes_in_the_header_and_nowhere_else() -> None:
    registry = RemoteRegistry("http://x", api_key="k")
    assert registry._server._client.headers["authorization"] == "Bearer k"
    assert "authorization" not in RemoteRegistry("http://x")._server._client.headers
