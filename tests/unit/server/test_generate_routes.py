"""``/generate`` and its batches: an answer that cannot be encoded, and items of any shape, harm nobody else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import server.openai.completion
import server.routes.generate
from server.answers import Identity, answer
from server.engine.types import Finished, TokenEvent
from tests.support.apps import Served, with_apps

GOOD = {"task": "e2e", "input": "x", "parameters": {"max_new_tokens": 3}}


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


BAD: list[tuple[Any, str]] = [
    (5, "invalid_request"),
    (None, "invalid_request"),
    ("x", "invalid_request"),
    ([GOOD], "invalid_request"),
    ({}, "invalid_request"),
    ({"input": nested(900)}, "invalid_request"),
    ({"input": "x", "parameters": {"stop": nested(900)}}, "invalid_request"),
    ({"input": "x", "\ud800": 1}, "invalid_request"),
    ({"input": "x", "task": "\ud800"}, "invalid_request"),
    ({"input": "x", "parameters": {"temperature": 10**400}}, "invalid_request"),
    ({"input": "x", "parameters": {"max_new_tokens": 10**400}}, "invalid_request"),
    ({"input": "x", "parameters": {"temperature": math.inf}}, "invalid_request"),
    ({"input": "x", "parameters": {"length_penalty": -100, "num_beams": 2}}, "invalid_parameter"),
    ({"input": "x", "parameters": {"repetition_penalty": 1e-320}}, "invalid_parameter"),
]


def post(items: list[Any]) -> dict[str, Any]:
    """The body escapes what is no Unicode, which httpx would not send."""
    return {"content": json.dumps({"items": items}), "headers": {"content-type": "application/json"}}


def test_a_bad_item_of_any_shape_fails_alone(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        alone = (await served.public.post("/generate", json=GOOD)).json()["outputs"]
        items = [GOOD, *(bad for bad, _ in BAD), GOOD]
        response = await served.public.post("/generate/batch", **post(items))
        assert response.status_code == 200, response.text
        first, *bad, last = response.json()["items"]
        assert [one["error"]["code"] for one in bad] == [code for _, code in BAD]
        assert first["outputs"] == last["outputs"] == alone

    with_apps(tmp_path, test)


@pytest.fixture
def unencodable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to the bare backbone have a score that no JSON can carry."""

    def spoilt(identity: Identity, finished: Finished) -> dict[str, Any]:
        body = answer(identity, finished)
        return body if identity.task else {**body, "score": -math.inf}

    monkeypatch.setattr(server.routes.generate, "answer", spoilt)


@pytest.mark.usefixtures("unencodable")
def test_an_answer_that_cannot_be_encoded_is_its_items_error(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        response = await served.public.post("/generate/batch", json={"items": [GOOD, {**GOOD, "task": None}, GOOD]})
        assert response.status_code == 200, response.text
        first, spoilt, last = response.json()["items"]
        assert spoilt["error"]["code"] == "internal"
        assert first["outputs"] == last["outputs"]

    with_apps(tmp_path, test)


@pytest.mark.usefixtures("unencodable")
def test_a_stream_whose_answer_cannot_be_encoded_ends_with_an_error(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        response = await served.public.post("/generate", json={**GOOD, "task": None, "stream": True})
        assert [line for line in response.text.splitlines() if line.startswith("event")][-1] == "event: error"
        assert '"internal"' in response.text
        assert "event: done" not in response.text

    with_apps(tmp_path, test)


def test_a_stream_whose_token_cannot_be_encoded_ends_with_an_error_and_its_request_is_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(event: TokenEvent) -> dict[str, Any]:
        return {"logprob": math.nan}

    monkeypatch.setattr(server.routes.generate, "token_body", spoilt)

    async def test(served: Served) -> None:
        long = {"input": "x", "stream": True, "parameters": {"max_new_tokens": 40, "min_new_tokens": 40}}
        response = await served.public.post("/generate", json=long)
        assert [line for line in response.text.splitlines() if line.startswith("event")] == ["event: error"]
        answered = await served.public.post("/generate", json=GOOD)
        assert answered.status_code == 200

    with_apps(tmp_path, test)


def test_an_openai_stream_whose_chunk_cannot_be_encoded_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*arguments: object) -> dict[str, Any]:
        return {"logprob": math.nan}

    monkeypatch.setattr(server.openai.completion, "chunk", spoilt)

    async def test(served: Served) -> None:
        body = {"model": "e2e", "prompt": ["x", "y"], "stream": True, "max_tokens": 5}
        (line,) = (await served.public.post("/v1/completions", json=body)).text.splitlines()[::2]
        assert json.loads(line.removeprefix("data: "))["error"]["code"] == "internal"

    with_apps(tmp_path, test)
