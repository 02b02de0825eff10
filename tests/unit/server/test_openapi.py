"""The server's documents name each route, method, status and range as the code has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema_rs import validator_for
from starlette.responses import Response

from prefixes.errors import InvalidName, InvalidParameter, TaskNotFound
from prefixes.spec import NAME_PATTERN, REFERENCE_PATTERN, TASK_PATTERN, TaskRef, check_name
from server.engine.types import MAX_ROWS_PER_REQUEST, SamplingParams
from server.parameter_schemas import PARAMETER_SCHEMAS
from server.schemas import GenerateItem
from server.web.openapi import DocumentedAPI, answers
from tests.support.apps import Served, with_apps
from tests.support.documents import check_document

SAMPLES = {"key_id": "AAAAAAAAAAAA", "tenant": "acme", "name": "e2e", "version": "production", "model": "e2e"}
RELATED: dict[str, dict[str, Any]] = {
    "length_penalty": {"num_beams": 2, "max_new_tokens": 1},
    "num_return_sequences": {"do_sample": True},
    "min_new_tokens": {"max_new_tokens": 1 << 31},
}


def test_both_documents_name_every_method_and_status_of_every_route(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        check_document(served.apps.public, SAMPLES)
        check_document(served.apps.admin, SAMPLES)

    with_apps(tmp_path, test)


def test_a_route_without_answers_is_found() -> None:
    app = DocumentedAPI(settings={}, title="bare")

    @app.get("/bare", response_class=Response)
    async def bare() -> None: ...

    with pytest.raises(AssertionError, match=r"no schema|expected answers"):
        check_document(app, {})


def test_limits_and_names_are_this_servers(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        schemas = served.apps.public.openapi()["components"]["schemas"]
        fields = schemas["Parameters"]["properties"]
        assert fields["max_new_tokens"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 77}
        assert fields["num_beams"]["anyOf"][0]["maximum"] == 3
        assert fields["seed"]["anyOf"][0]["exclusiveMaximum"] == 1 << 63
        assert schemas["BatchRequest"]["properties"]["items"]["maxItems"] == 5
        model = schemas["CompletionRequest"]["properties"]["model"]
        assert {"const": served.assembled.settings.backbone_name} in model["anyOf"]

    limits = {"max_new_tokens_limit": 77, "default_max_new_tokens": 7, "num_beams_limit": 3, "max_batch_items": 5}
    with_apps(tmp_path, test, **limits)


@pytest.mark.parametrize("name", [name for name in PARAMETER_SCHEMAS if name != "truncate"])
def test_a_documented_range_is_the_one_that_is_checked(name: str) -> None:
    most = {"maximum": MAX_ROWS_PER_REQUEST} if "x-setting" in PARAMETER_SCHEMAS[name] else {}
    schema = {**PARAMETER_SCHEMAS[name], **most}
    step = 1 if schema.get("type") == "integer" else 1e-6
    good: list[Any] = list(schema.get("enum", []))
    bad: list[Any] = []
    if "minimum" in schema:
        good, bad = [*good, schema["minimum"]], [*bad, schema["minimum"] - step]
    if "exclusiveMinimum" in schema:
        good, bad = [*good, 5e-324], [*bad, schema["exclusiveMinimum"]]
    if "maximum" in schema:
        good, bad = [*good, schema["maximum"]], [*bad, schema["maximum"] + step]
    if "exclusiveMaximum" in schema:
        good, bad = [*good, schema["exclusiveMaximum"] - 1], [*bad, schema["exclusiveMaximum"]]
    if name == "stop":
        item = schema["items"]
        good = [("x" * item["maxLength"],) * schema["maxItems"], ("x" * item["minLength"],), ()]
        bad = [("x",) * (schema["maxItems"] + 1), ("x" * (item["maxLength"] + 1),), ("",)]
    for value in good:
        SamplingParams(**{**RELATED.get(name, {}), name: value})
    if name in ("max_new_tokens", "min_new_tokens", "top_k", "no_repeat_ngram_size"):
        bad = bad[:1]  # their maximum is a setting's or any integer's, see ``Whole``
    assert bad or name in ("do_sample", "early_stopping")
    for value in bad:
        with pytest.raises(InvalidParameter):
            SamplingParams(**{**RELATED.get(name, {}), name: value})


@pytest.mark.parametrize(
    "text",
    ["a", "a-b", "a.b", "a..b", "-a", "a-", "A", "", "a" * 64, "a" * 65, "a/b", "a/b/c", "/a", "a@b", "a/b@c.d", "a@",
     "a@sha256:" + "0" * 64, "a@sha256:" + "0" * 63, "sha256:" + "0" * 64, "a\n", "a@b..c", "a..b/c", "é"],
)  # fmt: skip
def test_a_documented_name_is_one_that_is_taken(text: str) -> None:
    assert validator_for({"pattern": NAME_PATTERN}).is_valid(text) == _taken(lambda: check_name("task", text))
    assert validator_for({"pattern": REFERENCE_PATTERN}).is_valid(text) == _taken(lambda: TaskRef.parse(text))
    if "@" not in text:
        assert validator_for({"pattern": TASK_PATTERN}).is_valid(text) == _taken(lambda: TaskRef.parse(text))


def test_405_names_every_method_of_the_path(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        for path, allowed in {
            "/prefixes": "GET, POST",
            "/prefixes/e2e": "GET, DELETE",
            "/prefixes/acme/e2e": "GET, DELETE",
            "/prefixes/e2e/promote": "GET, POST, DELETE",
            "/generate": "POST",
        }.items():
            answer = await served.public.request("PATCH", path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed), path
            assert answer.json()["error"]["detail"] == {"expected": allowed}

    with_apps(tmp_path, test)


def test_whole_floats_are_integers_and_others_are_not() -> None:
    body = {"input": "x", "parameters": {"max_new_tokens": 3.0, "temperature": 1.0}}
    item = GenerateItem.model_validate(body)
    assert item.parameters.given() == {"max_new_tokens": 3, "temperature": 1.0}
    for value in (3.5, "3", True):
        with pytest.raises(ValueError, match="max_new_tokens"):
            GenerateItem.model_validate({"input": "x", "parameters": {"max_new_tokens": value}})


def test_under_v1_an_answer_has_openais_statuses() -> None:
    assert set(answers(None, InvalidName, TaskNotFound)) == {200, 401, 403, 404, 422, 500, 503}
    assert set(answers(None, InvalidName, TaskNotFound, openai=True)) == {200, 400, 401, 403, 404, 500, 503}
    assert set(answers(None, InvalidName, keyed=False)) == {200, 422, 500, 503}


def _taken(parse: Any) -> bool:
    try:
        parse()
    except InvalidName:
        return False
    return True
