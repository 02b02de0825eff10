"""A secret in the wrong place does not come back: in no answer, no header, no log line and no audit, of any route."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from prefixes.tenancy.secret import new_id, new_secret, without_secrets
from server.web.errors import InvalidRequest, error_body, openai_error_body
from tests.support.apps import Served, with_apps
from tests.support.routes import routes
from tests.unit.server.web.test_access_log import logged
from tests.unit.trainer.service.test_auth import with_trainer

SECRET: Final = new_secret(new_id())
ASKED: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"params": {SECRET: SECRET}},
    {"params": dict.fromkeys(("tenant", "limit", "state", "after", "from", "by", "version", "alias"), SECRET)},
    {"json": {SECRET: SECRET}},
    {"json": SECRET},
    {"json": {"task": SECRET, "input": "x"}},
    {"json": {"task": "e2e", "input": "x", "stream": True, "parameters": {SECRET: SECRET}}},
    {"json": {"task": f"a/{SECRET}", "dataset": SECRET, "preset": SECRET}},
    {"json": {"requests": [{"task": SECRET, "input": "x"}, {SECRET: 1}, SECRET]}},
    {"json": {"model": SECRET, "prompt": "x"}},
    {"json": {"model": "e2e", "prompt": "x", SECRET: 1, "stop": SECRET, "seed": SECRET}},
    {"json": {"name": SECRET, "tenant": SECRET, "scopes": [SECRET], "expires": SECRET, "alias": SECRET}},
    {"json": {"version": SECRET, "to": SECRET, "limits": {SECRET: 1}, "weight": SECRET, "expected_current": SECRET}},
    {"data": {"task": SECRET, "once": SECRET, "record": SECRET}, "files": {"file": (SECRET, SECRET.encode())}},
    {"content": SECRET, "headers": {"content-type": SECRET}},
    {"headers": {"host": SECRET}},
    {"headers": {"origin": f"https://{SECRET}.example"}},
    {"headers": {"idempotency-key": SECRET, "x-request-id": SECRET, "last-event-id": SECRET, "range": SECRET}},
)


async def ask_everywhere(app: FastAPI, headers: dict[str, str]) -> int:
    """Ask every route of ``app``, with the secret in every place; returns how many answers were errors."""
    errors = 0
    client = AsyncClient(transport=ASGITransport(app), base_url="http://localhost")
    paths = {(method, path) for _, method, path in routes("", app)} | {("GET", "/{none}"), ("PUT", "/prefixes/{x}")}
    for method, template in sorted(paths):
        path = "/".join(SECRET if "{" in part else part for part in template.split("/"))
        for asked in ASKED:
            given = {**asked, "headers": {**headers, **asked.get("headers", {})}}
            answer = await client.request(method, path, **given)
            assert answer.status_code != 500, (method, path, asked)
            told = f"{answer.text} {answer.headers!r}"
            assert SECRET[20:50] not in told, (method, template, asked, told[:1000])
            errors += answer.is_error
    return errors


def test_no_route_of_a_server_tells_a_secret(tmp_path: Path) -> None:
    """What came for a task's name, such as a key that was pasted there, stood whole in the error."""

    async def test(served: Served) -> None:
        with logged() as stream:
            assert await ask_everywhere(served.apps.public, {}) > 200
            assert await ask_everywhere(served.apps.admin, {}) > 20
        assert SECRET[20:50] not in stream.getvalue()

    with_apps(tmp_path, test, access_log=True)
    assert not [path for path in (tmp_path / "registry").rglob("*.json*") if SECRET[20:50] in path.read_text()]


def test_no_route_of_a_trainer_tells_a_secret(tmp_path: Path) -> None:
    async def test(public: FastAPI, admin: FastAPI, callers: Any) -> None:
        for caller in ("owner", "foreign"):
            with logged() as stream:
                assert await ask_everywhere(public, callers.headers[caller]) > 50
            assert SECRET[20:50] not in stream.getvalue()

    with_trainer(tmp_path, test)


@pytest.mark.parametrize("around", ["{}", "task: expected a name, got '{}'", "x{}-y", "\n{}\\n", "{0} {0}"])
def test_of_a_secret_the_id_alone_is_told_and_of_a_cut_one_too(around: str) -> None:
    told = without_secrets(around.format(SECRET))
    assert SECRET[16:] not in told and f"{SECRET[:16]}…" in told
    assert SECRET[17:50] not in without_secrets(around.format(SECRET[:50]))
    assert without_secrets(around.format(SECRET[:16])) == around.format(SECRET[:16])


def test_both_forms_of_an_error_and_all_its_details_are_free_of_secrets() -> None:
    error = InvalidRequest(SECRET, parameter=SECRET, got={SECRET: [SECRET, (SECRET,)]})
    for body in (error_body(error, None), openai_error_body(error)):
        assert SECRET not in json.dumps(body)
