"""Whatever a body holds, the answer is no 500 and an error has a code."""

from __future__ import annotations

import json

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["task", "input", "parameters", "stream", "items", "model", "prompt", "max_tokens", "n", "stop", "logprobs", "seed",
     "temperature", "top_k", "top_p", "num_beams", "max_new_tokens", "version", "alias", "stream_options", "echo"]
)
VALUES = JSON | st.sampled_from(["e2e", "dart", None, 1, 2, 0.5, True, {"max_new_tokens": 2}, ["x", "y"], "\ud800"])
BODIES = JSON | st.dictionaries(NAMES, VALUES, max_size=6)


@given(
    path=st.sampled_from(
        ["/generate", "/generate/batch", "/v1/completions", "/prefixes", "/prefixes/x/promote", "/prefixes/x/rollback"]
    ),
    body=BODIES,
    extra=st.dictionaries(NAMES, VALUES, max_size=3),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_whatever_is_a_500(client: httpx.Client, path: str, body: object, extra: dict[str, object]) -> None:
    if isinstance(body, dict):
        parameters = {"max_new_tokens": 2}
        body = {"input": "x", "parameters": parameters, **extra, **body} if path == "/generate" else {**extra, **body}
        if path == "/v1/completions":
            body = {"model": "e2e", "prompt": "x", "max_tokens": 2, **body}
    content = json.dumps(body)
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code < 500, (content, response.text)
    if response.status_code >= 400:
        assert response.json()["error"]["code"]


@given(content=st.binary(max_size=200), kind=st.sampled_from(["application/json", "multipart/form-data; boundary=a"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_whatever_are_a_500(client: httpx.Client, content: bytes, kind: str) -> None:
    for path in ("/generate", "/prefixes"):
        response = client.post(path, content=content, headers={"content-type": kind})
        assert 400 <= response.status_code < 500, response.text
        assert response.json()["error"]["code"]
