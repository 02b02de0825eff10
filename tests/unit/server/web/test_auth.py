"""Every route asks the one place that decides."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import server.web.auth
from server.web.errors import Forbidden
from tests.support.apps import Served, with_apps

OPEN = {"/health", "/ready"}


def with_app(tmp_path: Path, test: Callable[[FastAPI, httpx.AsyncClient, bytes], Coroutine[Any, Any, None]]) -> None:
    """Run ``test`` against the public application, with a task ``e2e`` in its registry."""

    async def run(served: Served) -> None:
        await test(served.apps.public, served.public, served.data)

    with_apps(tmp_path, run)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> None:
        raise Forbidden("no")

    real = server.web.auth.authorize
    for module in list(sys.modules.values()):
        if getattr(module, "authorize", None) is real:
            monkeypatch.setattr(module, "authorize", forbidden)


def bodies(data: bytes) -> dict[str, dict[str, Any]]:
    version = "sha256:" + "0" * 64
    return {
        "/generate": {"json": {"task": "e2e", "input": "x"}},
        "/generate/batch": {"json": {"items": [{"task": "e2e", "input": "x"}]}},
        "/v1/completions": {"json": {"model": "e2e", "prompt": "x"}},
        "/prefixes": {"data": {"task": "e2e"}, "files": {"file": ("x", data)}},
        "/prefixes/{name}/promote": {"json": {"version": version}},
        "/prefixes/{tenant}/{name}/promote": {"json": {"version": version}},
    }


def test_no_route_acts_without_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient, data: bytes) -> None:
        forbid(monkeypatch)
        routes = [
            (method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods
        ]
        assert len(routes) >= 19
        for method, template in routes:
            path = template.format(tenant="default", name="e2e", version="production", model="e2e")
            arguments = bodies(data).get(template, {}) if method == "POST" else {}
            response = await client.request(method, path, **arguments)
            if template in OPEN:
                assert response.status_code == 200
            elif (method, template) in (("GET", "/prefixes"), ("GET", "/v1/models"), ("POST", "/generate/batch")):
                assert "sha256" not in response.text.replace(app.state.runtime.backbone.spec.fingerprint, "")
                assert "outputs" not in response.text
            else:
                assert (response.status_code, method, template) == (403, method, template)
        assert (await client.post("/generate", json={"input": "x"})).status_code == 403

    with_app(tmp_path, test)


def test_without_keys_the_default_tenant_may_do_everything(tmp_path: Path) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient, data: bytes) -> None:
        body = {"task": "e2e", "input": "x", "parameters": {"max_new_tokens": 1}}
        assert (await client.post("/generate", json=body)).json()["task"] == "default/e2e"
        upload = await client.post("/prefixes", data={"task": "acme/e2e"}, files={"file": ("x", data)})
        assert upload.json()["task"] == "acme/e2e"
        listed = (await client.get("/prefixes")).json()["prefixes"]
        assert [task["task"] for task in listed] == ["acme/e2e", "default/e2e"]

    with_app(tmp_path, test)
