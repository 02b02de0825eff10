"""Who may do what with the trainer, as one table: every route of both ports, asked by every kind of caller."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import httpx
from fastapi import APIRouter, FastAPI
from starlette.routing import Route

from prefixes.registry import open_registry
from prefixes.tenancy.model import Scope
from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.callers import expected, make_callers
from tests.support.datasets import lines
from trainer.service.app import create_admin, create_public
from trainer.service.assembly import assemble
from trainer.service.settings import TrainerSettings

OPEN: Final = "open"
TABLE: Final[dict[tuple[str, str, str], Scope | str | None]] = {
    ("public", "GET", "/health"): OPEN,
    ("public", "GET", "/ready"): OPEN,
    ("public", "GET", "/openapi.json"): None,
    ("public", "GET", "/docs"): None,
    ("public", "GET", "/docs/oauth2-redirect"): None,
    ("public", "GET", "/redoc"): None,
    ("public", "GET", "/backbones"): Scope.TRAIN,
    ("public", "POST", "/datasets"): Scope.TRAIN,
    ("public", "GET", "/datasets"): Scope.TRAIN,
    ("public", "GET", "/datasets/{digest}"): Scope.TRAIN,
    ("public", "DELETE", "/datasets/{digest}"): Scope.TRAIN,
    ("public", "POST", "/jobs"): Scope.TRAIN,
    ("public", "GET", "/jobs"): Scope.TRAIN,
    ("public", "GET", "/jobs/{job_id}"): Scope.TRAIN,
    ("public", "GET", "/jobs/{job_id}/events"): Scope.TRAIN,
    ("public", "GET", "/jobs/{job_id}/report"): Scope.TRAIN,
    ("public", "POST", "/jobs/{job_id}/cancel"): Scope.TRAIN,
    ("public", "POST", "/jobs/{job_id}/retry"): Scope.TRAIN,
    ("public", "DELETE", "/jobs/{job_id}"): Scope.TRAIN,
    ("admin", "GET", "/health"): OPEN,
    ("admin", "GET", "/ready"): OPEN,
    ("admin", "GET", "/openapi.json"): None,
    ("admin", "GET", "/metrics"): Scope.METRICS,
}
"""Port, method and path: open to everybody, or the scope that it takes, None for any key."""


def routes(port: str, routed: FastAPI | APIRouter) -> Iterator[tuple[str, str, str]]:
    """Every route there is, also what the document leaves out."""
    for route in routed.routes:
        if isinstance(route, Route):
            yield from ((port, method, route.path) for method in (route.methods or set()) - {"HEAD"})
        else:
            yield from routes(port, route.original_router)  # type: ignore[attr-defined]


def test_every_route_asks_every_caller(tmp_path: Path) -> None:
    async def test(public: FastAPI, admin: FastAPI, callers: Any) -> int:
        denied = 0
        there = [*routes("public", public), *routes("admin", admin)]
        assert set(there) == set(TABLE), set(there) ^ set(TABLE)
        clients = {
            name: httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
            for name, app in (("public", public), ("admin", admin))
        }
        data = lines(3)
        uploaded = await clients["public"].post("/datasets", content=data, headers=callers.headers["owner"])
        digest = uploaded.json()["dataset"]
        sent = {"/datasets": {"content": data}, "/jobs": {"json": {"task": "acme/e2e", "dataset": digest}}}
        for port, method, template in there:
            needs = TABLE[port, method, template]
            path = template.format(digest=digest, job_id="job-x")
            given: Any = sent.get(template, {}) if method == "POST" else {}
            for caller, headers in callers.headers.items():
                answer = await clients[port].request(method, path, headers=headers, **given)
                case = (caller, method, path, answer.status_code, answer.text[:300])
                assert answer.status_code < 500, case
                if needs == OPEN:
                    assert answer.status_code == 200, case
                    continue
                scope = needs if isinstance(needs, Scope) else None
                wanted = expected(caller, scope, foreign=0)
                if (method, template) == ("POST", "/jobs") and wanted is None:  # it publishes as well
                    codes = {"foreign": 404, "owner": None, "operator": None, "only operator": None}
                    refused = answer.status_code in (401, 403) or "task_not_found" in answer.text
                    assert (answer.status_code if refused else None) == codes.get(caller, 403), case
                else:
                    refused = answer.status_code in (401, 403)
                    assert (answer.status_code if refused else None) == wanted, case
                denied += refused
        for what in ("/datasets", "/jobs"):
            told = (await clients["public"].get(what, headers=callers.headers["foreign"])).text
            assert digest not in told or what == "/datasets"
        return denied

    async def run() -> None:
        given = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry")}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        try:
            callers = make_callers(trainer.worker.registry.tenancy)  # type: ignore[attr-defined]
            trainer.runtime.keyring.look()
            intake = Intake(60, 1 << 20)
            denied = await test(create_public(trainer.runtime, intake), create_admin(trainer.runtime, intake), callers)
        finally:
            await trainer.close()
        with closing(open_registry(str(tmp_path / "registry"))) as registry:
            kept = [*map(registry.tenancy.denials, (None, "acme", "globex", "initech", "ops"))]
        assert sum(denial.count for denials in kept for denial in denials) == denied  # each, and nothing else

    asyncio.run(run())
