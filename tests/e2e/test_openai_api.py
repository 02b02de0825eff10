"""The ``openai`` package against the server, unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.support.server import ServerProcess, wait_for_metric


@pytest.fixture
def api(server: ServerProcess, client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        yield api


def test_a_completion_is_what_generate_answers(api: openai.OpenAI, client: httpx.Client) -> None:
    completion = api.completions.create(model="e2e", prompt="x", max_tokens=8)
    body = {"task": "e2e", "input": "x", "parameters": {"max_new_tokens": 8}}
    answer = client.post("/generate", json=body).json()
    assert completion.choices[0].text == answer["outputs"][0]["text"]
    assert completion.choices[0].finish_reason == answer["outputs"][0]["finish_reason"]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == answer["usage"]["input_tokens"]
    assert (completion.object, completion.model) == ("text_completion", "e2e")


@pytest.mark.parametrize("prompt", ["x", ["x", "yy", "zzz"]])
def test_a_stream_joined_is_the_completion(api: openai.OpenAI, prompt: str | list[str]) -> None:
    def ask(stream: bool) -> dict[str, object]:
        return {"model": "dart", "prompt": prompt, "max_tokens": 12, "n": 2, "seed": 3, "stream": stream}

    whole = api.completions.create(**ask(False))  # type: ignore[call-overload]
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    chunks = api.completions.create(**ask(True), stream_options={"include_usage": True})  # type: ignore[call-overload]
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    assert len(texts) == 2 * (1 if isinstance(prompt, str) else 3)


def test_beams_and_our_other_parameters_go_through_extra_body(api: openai.OpenAI) -> None:
    extra = {"num_beams": 2}
    whole = api.completions.create(model="e2e", prompt="x", max_tokens=5, extra_body=extra)
    chunks = list(api.completions.create(model="e2e", prompt="x", max_tokens=5, extra_body=extra, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_logprobs_have_openais_form(api: openai.OpenAI) -> None:
    choice = api.completions.create(model="e2e", prompt="x", max_tokens=4, logprobs=2, temperature=0).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    chosen = zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)
    for token, logprob, top in list(chosen)[:-1]:  # at the limit BART's end token is forced, likely or not
        assert max(top.values()) == logprob
        assert top[token] == logprob


@pytest.mark.parametrize("logprobs", [0, 2])
def test_sampled_tokens_have_their_logprobs_and_point_into_the_text(api: openai.OpenAI, logprobs: int) -> None:
    ask = {"model": "e2e", "prompt": "x", "max_tokens": 24, "logprobs": logprobs, "temperature": 50, "seed": 5}
    choice = api.completions.create(**ask).choices[0]  # type: ignore[call-overload]
    told = choice.logprobs
    streamed: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == logprob
        assert len(top) <= logprobs + 1
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        special = token.startswith("<") and token.endswith(">")
        if "\ufffd" not in token and not special:
            assert choice.text[offset : offset + len(token)] == token
    for chunk in api.completions.create(**ask, stream=True):  # type: ignore[call-overload]
        for name, values in streamed.items():
            values += getattr(chunk.choices[0].logprobs, name) if chunk.choices[0].logprobs else []
    assert streamed == {name: getattr(told, name) for name in streamed}


@pytest.mark.parametrize("num_beams", [1, 2])
def test_with_include_usage_all_chunks_but_the_last_say_null(client: httpx.Client, num_beams: int) -> None:
    body = {"model": "e2e", "prompt": "x", "max_tokens": 5, "stream": True, "num_beams": num_beams}

    def chunks(**more: object) -> list[dict[str, object]]:
        lines = client.post("/v1/completions", json={**body, **more}).text.splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    *others, last = chunks(stream_options={"include_usage": True})
    assert others
    assert all("usage" in chunk and chunk["usage"] is None for chunk in others)
    assert last["usage"]
    assert not last["choices"]
    assert all("usage" not in chunk for chunk in chunks())


def test_models_are_the_backbone_and_the_tasks(api: openai.OpenAI, server: ServerProcess) -> None:
    names = [model.id for model in api.models.list()]
    assert {"e2e", "dart"} < set(names)
    assert api.completions.create(model=names[0], prompt="x", max_tokens=1).choices
    for name in ("e2e", "default/e2e", "default/e2e@production", names[0]):
        assert api.models.retrieve(name).id == name
        assert api.completions.create(model=name, prompt="x", max_tokens=1).model == name
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("nobody")


def test_errors_arrive_as_the_packages_own(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "task_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        api.completions.create(model="e2e", prompt="x", presence_penalty=1)
    assert unsupported.value.param == "presence_penalty"
    with pytest.raises(openai.BadRequestError) as ids:
        api.completions.create(model="e2e", prompt=[1, 2, 3])
    assert ids.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as unknown:
        api.completions.create(model="e2e", prompt="x", extra_body={"temprature": 1})
    assert "did you mean temperature" in unknown.value.message
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model="e2e", prompt="x", max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="e2e", messages=[])


def test_closing_a_stream_ends_its_request(api: openai.OpenAI, server: ServerProcess) -> None:
    stream = api.completions.create(model="e2e", prompt=["x", "y"], max_tokens=8000, temperature=1, stream=True)
    next(iter(stream))
    stream.close()
    wait_for_metric(server, "prefixd_num_requests_running", 0, timeout_s=5)


def test_a_bad_prompt_among_good_ones_leaves_nothing_running(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model="e2e", prompt=["x", "x" * 60000], max_tokens=8000)
