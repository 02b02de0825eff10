"""Limits on a server: what is reserved and settled, what a caller is told, and how often the limiter is asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

import server.app
from prefixes.artifact import write_prefix
from prefixes.errors import QueueFull
from prefixes.limiter.base import Window
from prefixes.tenancy.directory import Directory, NewKey
from prefixes.tenancy.limits import Limits
from server.limit_headers import HEADERS, duration
from server.reservations import Reservations
from server.web.auth import Caller
from server.web.authentication import caller_with
from tests.support.apps import Served, with_apps
from tests.support.callers import bearer
from tests.support.limits import CountedLimiter, set_limits
from tests.support.prefixes import make_prefix

LENGTH = {"max_new_tokens": 4, "min_new_tokens": 4}
BODY = {"input": "x", "parameters": LENGTH}
COMPLETION = {"max_tokens": 4, "prompt": "x"}


class Limited:
    """A server whose tenant acme has two keys."""

    def __init__(self, served: Served, limiter: CountedLimiter) -> None:
        self.served, self.limiter, self.client = served, limiter, served.public
        self._store = served.assembled.link.registry.tenancy
        self.keys: list[NewKey] = [
            Directory(self._store).create_key("acme", "ci", ["generate"], actor="test") for _ in range(2)
        ]
        self.limit()

    def limit(self, of_tenant: Limits | None = None, of_key: Limits | None = None) -> None:
        """Give the tenant and its first key these limits."""
        set_limits(
            self._store, tenants={"acme": of_tenant or Limits()}, keys={self.keys[0].key.id: of_key or Limits()}
        )
        self.served.assembled.keyring.look()

    @property
    def caller(self) -> Caller:
        """Who asks with the first key."""
        return caller_with(self.served.assembled.keyring.known, self.keys[0].key)

    async def post(
        self, path: str = "/generate", body: Any = None, *, key: int = 0, status: int = 200
    ) -> httpx.Response:
        response = await self.client.post(path, json=body or BODY, headers=bearer(self.keys[key].secret))
        assert response.status_code == status, response.text
        return response

    def used(self, counter: str, window: Window, *, of_key: bool = False) -> int:
        return self.limiter.used(counter, window, key=self.keys[0].key.id if of_key else None)


@pytest.fixture
def with_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    def run(test: Callable[[Limited], Coroutine[Any, Any, None]], *, remote: bool = False, **settings: Any) -> None:
        limiter = CountedLimiter(remote)
        monkeypatch.setattr(server.app, "open_limiter", lambda url, usage, service: limiter)

        async def limited(served: Served) -> None:
            await test(Limited(served, limiter))

        with_apps(tmp_path, limited, **settings)

    return run


WithLimits = Callable[..., None]


def total(answer: Any) -> int:
    return sum(answer["usage"].values())


def error_of(response: httpx.Response) -> Any:
    return response.json()["error"]


def told(response: httpx.Response) -> dict[str, str]:
    return {name: response.headers[name] for name in HEADERS if name in response.headers}


@pytest.mark.parametrize("path", ["/generate", "/generate/batch", "/v1/completions"])
def test_answers_tell_the_tightest_limit_and_what_is_left(with_limits: WithLimits, path: str) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(
            Limits(requests_per_minute=60, tokens_per_minute=6000), Limits(requests_per_minute=30, tokens_per_day=500)
        )
        model = limited.served.assembled.settings.backbone_name
        body = {"/generate": BODY, "/generate/batch": {"items": [BODY]}}.get(path, {**COMPLETION, "model": model})
        response = await limited.post(path, body)
        reserved = limited.used("tokens", Window.DAY, of_key=True)  # all of it was used
        assert reserved == 1 + 4
        assert told(response) == {
            "x-ratelimit-limit-requests": "30", "x-ratelimit-remaining-requests": "29",
            "x-ratelimit-reset-requests": "2s", "x-ratelimit-limit-tokens": "500",
            "x-ratelimit-remaining-tokens": str(500 - reserved), "x-ratelimit-reset-tokens": "12h0m0s",
        }  # fmt: skip

    with_limits(test)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"), (0.0165, "17ms"), (0.9991, "1s"), (1.0, "1s"), (1.2, "2s"), (59.5, "1m0s"), (360.0, "6m0s"),
        (3600.0, "1h0m0s"), (43_200.0, "12h0m0s"), (90_061.0, "25h1m1s"),
    ],
)  # fmt: skip
def test_a_reset_has_openais_form(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_rate_that_is_used_up_is_429_with_when_to_come_back(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=2))
        for _ in range(2):
            await limited.post()
        response = await limited.post(status=429)
        assert error_of(response)["code"] == "rate_limited"
        assert {"limit": "requests_per_minute", "expected": 2, "got": 3}.items() <= error_of(response)["detail"].items()
        assert response.headers["retry-after"] == "30"
        assert told(response)["x-ratelimit-remaining-requests"] == "0"
        model = limited.served.assembled.settings.backbone_name
        response = await limited.post("/v1/completions", {**COMPLETION, "model": model}, status=429)
        assert (error_of(response)["type"], error_of(response)["code"]) == ("rate_limit_error", "rate_limited")
        assert response.headers["retry-after"] == "30" and told(response)["x-ratelimit-limit-requests"] == "2"
        limited.limiter.now += 30
        await limited.post()

    with_limits(test)


@pytest.mark.parametrize(("name", "window"), [("tokens_per_day", Window.DAY), ("tokens_per_month", Window.MONTH)])
def test_a_quota_warns_and_then_is_403(with_limits: WithLimits, name: str, window: Window) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(**{name: 10**9}))
        size = total((await limited.post()).json())
        used = limited.used("tokens", window)
        assert used == size
        limited.limit(Limits(**{name: 5 * size}))
        for number in (2, 3):
            assert "x-prefixd-quota-warning" not in (await limited.post()).headers, number
        response = await limited.post()
        assert response.headers["x-prefixd-quota-warning"] == f"{name} of the tenant: {4 * size} of {5 * size} used"
        await limited.post()
        response = await limited.post(status=403)
        assert error_of(response)["code"] == "quota_exceeded"
        assert {"limit": name, "expected": 5 * size, "got": 6 * size}.items() <= error_of(response)["detail"].items()
        assert told(response)["x-ratelimit-remaining-tokens"] == "0" and "retry-after" not in response.headers
        assert limited.used("tokens", window) == 5 * size

    with_limits(test)


def test_a_request_above_the_whole_limit_is_422_and_takes_nothing(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=10, tokens_per_minute=50))
        response = await limited.post(body={**BODY, "parameters": {"max_new_tokens": 50}}, status=422)
        assert error_of(response)["code"] == "invalid_parameter"
        assert error_of(response)["detail"] == {
            "parameter": "max_new_tokens", "limit": "tokens_per_minute", "of": "tenant", "expected": 50, "got": 51
        }  # fmt: skip
        assert told(response) == {}, "nothing was counted, so there is nothing to tell"
        body = {"model": "e2e", "prompt": ["x"] * 3, "max_tokens": 20}
        limited.served.assembled.link.registry.publish("acme", "e2e", limited.served.data, record={})
        response = await limited.post("/v1/completions", body, status=400)
        assert error_of(response)["param"] == "max_new_tokens"
        assert limited.limiter.calls == []

    with_limits(test)


def test_what_a_request_may_need_is_reserved_and_what_it_used_is_settled(with_limits: WithLimits) -> None:
    """Reserved: input, prefix, and max_new_tokens of every row. It is held until the request has ended."""

    async def test(limited: Limited) -> None:
        limited.limit(Limits(tokens_per_day=10_000))
        spec = limited.served.assembled.backbone.spec
        prefix = make_prefix(spec, length=5, defaults={})
        limited.served.assembled.link.registry.publish("acme", "mine", write_prefix(prefix), record={})
        parameters = {"max_new_tokens": 6, "min_new_tokens": 3, "num_beams": 3}
        response = await limited.post(body={"task": "mine", "input": "x", "parameters": parameters})
        usage = response.json()["usage"]
        reserved = usage["input_tokens"] + usage["prefix_tokens"] + 3 * 6
        assert response.headers["x-ratelimit-remaining-tokens"] == str(10_000 - reserved)
        assert usage["prefix_tokens"] == 5 and limited.used("tokens", Window.DAY) == total(response.json()) < reserved

    with_limits(test)


def test_a_streams_headers_are_those_of_its_admission(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(tokens_per_day=10_000))
        response = await limited.post(body={**BODY, "parameters": {"max_new_tokens": 4}, "stream": True})
        done = json.loads(response.text.split("event: done\ndata: ")[1].split("\n")[0])
        assert response.headers["x-ratelimit-remaining-tokens"] == str(10_000 - done["usage"]["input_tokens"] - 4)
        assert limited.used("tokens", Window.DAY) == total(done)
        model = limited.served.assembled.settings.backbone_name
        response = await limited.post("/v1/completions", {**COMPLETION, "model": model, "stream": True})
        assert "x-ratelimit-remaining-tokens" in response.headers

    with_limits(test)


def test_a_keys_limits_are_its_own_inside_its_tenants(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=3), Limits(requests_per_minute=1))
        await limited.post(key=0)
        refused = error_of(await limited.post(key=0, status=429))
        assert refused["message"].startswith("requests_per_minute of the key: expected at most 1, got 2")
        await limited.post(key=1)
        await limited.post(key=1)
        refused = error_of(await limited.post(key=1, status=429))
        assert refused["message"].startswith("requests_per_minute of the tenant: expected at most 3, got 4")

    with_limits(test)


def test_parameters_have_the_callers_limits(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(max_new_tokens=8, num_beams=2), Limits(max_new_tokens=6))
        for name, most in (("max_new_tokens", 6), ("num_beams", 2)):
            refused = error_of(await limited.post(body={"input": "x", "parameters": {name: most + 1}}, status=422))
            assert refused["message"] == f"{name}: expected at most {most}, the caller's limit; got {most + 1}"
            assert refused["detail"] == {"parameter": name, "expected": most, "got": most + 1}
            await limited.post(body={"input": "x", "parameters": {name: most}})
        without = (await limited.post(body={"input": "x", "parameters": {"min_new_tokens": 6}})).json()
        assert without["usage"]["output_tokens"] == 6
        await limited.post(key=1, body={"input": "x", "parameters": {"max_new_tokens": 8}})
        too_much = {"input": "x", "parameters": {"max_new_tokens": 10**6}}
        assert "the caller's limit" in error_of(await limited.post(body=too_much, status=422))["message"]

    with_limits(test)


def test_items_of_a_batch_are_requests_of_their_own(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=2, tokens_per_day=10_000))
        too_long = {"input": "x", "parameters": {"max_new_tokens": 100_000}}
        response = await limited.post("/generate/batch", {"items": [BODY, too_long, BODY, BODY]})
        first, bad, second, refused = response.json()["items"]
        assert (bad["error"]["code"], refused["error"]["code"]) == ("invalid_parameter", "rate_limited")
        assert refused["error"]["detail"]["retry_after_s"] == pytest.approx(30)
        assert limited.used("tokens", Window.DAY) == total(first) + total(second)
        assert response.headers["x-ratelimit-remaining-requests"] == "0"

    with_limits(test, max_new_tokens_limit=200)


def test_the_prompts_of_a_completion_are_admitted_together_or_not_at_all(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=4, tokens_per_day=10_000))
        model = limited.served.assembled.settings.backbone_name
        body = {"model": model, "prompt": ["x", "y", "x y"], "max_tokens": 4}
        first = (await limited.post("/v1/completions", body)).json()["usage"]["total_tokens"]
        assert (limited.used("requests", Window.MINUTE), limited.used("tokens", Window.DAY)) == (3, first)
        await limited.post("/v1/completions", body, status=429)
        assert (limited.used("requests", Window.MINUTE), limited.used("tokens", Window.DAY)) == (3, first)
        assert limited.limiter.calls.count("take") == 2 and limited.limiter.calls.count("settle") == 1

    with_limits(test)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_what_the_engine_refuses_is_given_back(with_limits: WithLimits, path: str) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=10, tokens_per_day=10_000))
        model = limited.served.assembled.settings.backbone_name
        body = {"/generate": BODY, "/v1/completions": {**COMPLETION, "model": model}}[path]
        with mock.patch.object(limited.served.assembled.engine, "check", side_effect=QueueFull("full")):
            await limited.post(path, body, status=429)
        assert limited.limiter.calls == ["take", "settle", "settled"]
        assert (limited.used("requests", Window.MINUTE), limited.used("tokens", Window.DAY)) == (0, 0)

    with_limits(test)


def test_prompts_that_were_submitted_before_a_refusal_cost_what_they_computed(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=10, tokens_per_day=10_000))
        model = limited.served.assembled.settings.backbone_name
        body = {"model": model, "prompt": ["x", "y"], "max_tokens": 500}
        with mock.patch.object(limited.served.assembled.engine, "check", side_effect=[None, QueueFull("full")]):
            await limited.post("/v1/completions", body, status=429)
        while "settled" not in limited.limiter.calls:
            await asyncio.sleep(0)
        assert limited.used("requests", Window.MINUTE) == 1
        assert limited.used("tokens", Window.DAY) < 500

    with_limits(test)


def test_a_request_whose_client_leaves_costs_what_it_computed(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(tokens_per_day=100_000))
        service = limited.served.apps.public.state.runtime.service
        long = {"max_new_tokens": 200, "min_new_tokens": 200}
        running = await service.admit(limited.caller, None, "x", long, "r1", lambda states: None)
        running.stream.abort()
        async for event in running.stream:
            last = event
        usage = last.usage
        spent = usage.input_tokens + usage.prefix_tokens + usage.output_tokens
        assert limited.used("tokens", Window.DAY) == spent < 200

    with_limits(test)


def test_an_open_server_has_no_limits_and_asks_no_limiter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = CountedLimiter(remote=True)
    monkeypatch.setattr(server.app, "open_limiter", lambda url, usage, service: limiter)

    async def test(served: Served) -> None:
        response = await served.public.post("/generate", json={**BODY, "task": "e2e"})
        assert response.status_code == 200 and told(response) == {}
        assert limiter.calls == []

    with_apps(tmp_path, test)
    assert limiter.calls == ["close"]


def test_a_remote_limiter_is_asked_once_at_admission_and_once_at_the_end_off_the_loop(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(tokens_per_day=100_000, requests_per_minute=10), Limits(tokens_per_minute=1000))
        limited.limiter.settling.clear()
        await limited.post()
        while "settle" not in limited.limiter.calls:
            await asyncio.sleep(0)
        assert limited.limiter.calls == ["take", "settle"]  # the answer did not wait for it
        assert threading.get_ident() not in limited.limiter.threads
        threading.Timer(0.2, limited.limiter.settling.set).start()
        observed.append(limited.limiter)

    observed: list[CountedLimiter] = []
    with_limits(test, remote=True)
    assert observed[0].calls == ["take", "settle", "settled", "close"]  # drained at the shutdown


def test_a_local_limiter_is_asked_on_the_loop(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(tokens_per_day=100_000))
        await limited.post()
        assert limited.limiter.calls == ["take", "settle", "settled"]
        assert limited.limiter.threads == {threading.get_ident()}

    with_limits(test)


def test_a_client_that_leaves_while_the_limiter_is_asked_gets_all_back(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=10, tokens_per_day=10_000))
        limited.limiter.taking.clear()
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not sent:
                sent.append(True)
                return {"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError("there is nobody to answer")

        sent: list[bool] = []
        headers = {"host": "localhost", "content-type": "application/json", **bearer(limited.keys[0].secret)}
        scope = {
            "type": "http", "method": "POST", "path": "/generate", "query_string": b"", "http_version": "1.1",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "scheme": "http",
            "server": ("localhost", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        request = asyncio.create_task(limited.served.apps.public(scope, receive, send))
        while "take" not in limited.limiter.calls:
            await asyncio.sleep(0)
        left.set()
        await asyncio.sleep(0.05)
        limited.limiter.taking.set()
        await request
        while "settled" not in limited.limiter.calls:
            await asyncio.sleep(0)
        assert (limited.used("requests", Window.MINUTE), limited.used("tokens", Window.DAY)) == (0, 0)

    with_limits(test, remote=True)


def test_what_is_open_is_renewed_and_nothing_else(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        limited.limit(Limits(tokens_per_day=100_000))
        service = limited.served.apps.public.state.runtime.service
        await limited.post()
        await service._reservations.renew()
        assert limited.limiter.renewed == []
        prepared = await service.prepare(limited.caller, None, "x", LENGTH, "mine")
        with await service.reserve(limited.caller, [prepared], lambda states: None):
            await service._reservations.renew()
            assert [name.split(":")[1].split("#")[0] for name in limited.limiter.renewed] == ["mine"]

    with_limits(test)


def test_one_request_id_at_two_replicas_is_two_reservations(with_limits: WithLimits) -> None:
    """Clients choose request ids. Were they the limiter's, whoever sends one twice would get the second for nothing."""

    async def test(limited: Limited) -> None:
        limited.limit(Limits(requests_per_minute=10))
        prepared = await limited.served.apps.public.state.runtime.service.prepare(limited.caller, None, "x", {}, "mine")
        for _ in range(2):
            replica = Reservations(limited.limiter, limited.served.assembled.keyring)
            await replica.reserve(limited.caller, [prepared.request], lambda states: None)
        assert limited.used("requests", Window.MINUTE) == 2

    with_limits(test)


def test_pages_of_other_origins_may_read_the_headers(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        origin = "https://app.example.com"
        headers = {**bearer(limited.keys[0].secret), "origin": origin}
        response = await limited.client.post("/generate", json=BODY, headers=headers)
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert set(HEADERS) <= set(exposed) and "retry-after" in exposed

    with_limits(test, allowed_origins=["https://app.example.com"])


def test_the_document_says_which_answers_carry_the_headers(with_limits: WithLimits) -> None:
    async def test(limited: Limited) -> None:
        paths = limited.served.apps.public.openapi()["paths"]
        for path in ("/generate", "/v1/completions"):
            responses = paths[path]["post"]["responses"]
            for status in ("200", "403", "429"):
                assert set(HEADERS) <= set(responses[status]["headers"]), (path, status)
            assert "Retry-After" in responses["429"]["headers"]
            assert "rate_limited" in responses["429"]["description"]
            assert "quota_exceeded" in responses["403"]["description"]
        assert set(HEADERS) <= set(paths["/generate/batch"]["post"]["responses"]["200"]["headers"])

    with_limits(test)
