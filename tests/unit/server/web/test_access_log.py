"""The access log as it is written: each line names tenant, key and request, of refused ones too, and tells nothing."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefixes.tenancy.secret import new_id, new_secret
from server.web.logs import JsonFormatter
from tests.support.apps import Served, with_apps
from tests.support.callers import NOBODY, make_callers

PROMPT = "the prompt that nobody shall read"


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """Everything that is logged meanwhile, as a service writes it."""
    stream = io.StringIO()
    handler, root = logging.StreamHandler(stream), logging.getLogger()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(lambda record: not record.name.startswith("http"))  # the test's own client
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def requests_in(text: str) -> list[dict[str, Any]]:
    """The access log's lines."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if line["logger"] == "prefixd.http" and line["message"] == "request"]


def test_every_line_names_tenant_key_and_request_and_no_secret_and_no_prompt(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        registry = served.assembled.link.registry
        registry.publish("acme", "e2e", served.data, record={})
        callers = make_callers(registry.tenancy)
        served.assembled.keyring.look()
        state = served.assembled.keyring.known.tenancy
        with logged() as stream:
            for number, headers in enumerate(callers.headers.values()):
                body = {"task": "acme/e2e", "input": PROMPT, "parameters": {"max_new_tokens": 1}}
                await served.public.post("/generate", json=body, headers={**headers, "x-request-id": f"id-{number}"})
            text = stream.getvalue()
        lines = {line["request_id"]: line for line in requests_in(text)}
        assert len(lines) == len(callers.headers)
        for number, who in enumerate(callers.headers):
            line = lines[f"id-{number}"]
            if who in NOBODY and who not in ("expired", "revoked"):
                assert (line["tenant"], line["key"], line["status"]) == (None, None, 401), who
                continue
            tenant = {"blocked": "initech", "foreign": "globex", "operator": "ops"}.get(who, "acme")
            assert (line["tenant"], state.keys[line["key"]].tenant) == (tenant, tenant), who
            if who in ("expired", "revoked", "blocked"):
                assert line["status"] == (403 if who == "blocked" else 401)
        assert PROMPT not in text and "pfx_" not in text

    with_apps(tmp_path, test, access_log=True)


def test_a_secret_in_the_wrong_place_is_not_logged(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        secret = new_secret(new_id())
        with logged() as stream:
            for path in (f"/keys/{secret}", f"/prefixes/{secret}", f"/{secret}"):
                answer = await served.public.get(path, headers={"x-request-id": secret})
                assert secret not in answer.headers["x-request-id"]
            text = stream.getvalue()
        assert len(requests_in(text)) == 3 and secret not in text

    with_apps(tmp_path, test, access_log=True)


def test_an_open_service_names_the_default_tenant_and_no_key(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        with logged() as stream:
            await served.public.get("/prefixes", headers={"x-request-id": "one"})
            (line,) = requests_in(stream.getvalue())
        assert (line["tenant"], line["key"], line["request_id"]) == ("default", None, "one")

    with_apps(tmp_path, test, access_log=True)
