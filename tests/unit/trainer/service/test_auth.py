"""Who may do what with the trainer, as one table: every route of both ports, asked by every kind of caller."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import httpx
from fastapi import FastAPI

from prefixes.registry import open_registry
from prefixes.tenancy.model import Scope
from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.callers import Callers, expected, make_callers
from tests.support.datasets import lines
from tests.support.routes import routes
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


Test = Callable[[FastAPI, FastAPI, Callers], Awaitable[None]]


def with_trainer(tmp_path: Path, test: Test) -> None:
    """Run ``test`` with both applications of a trainer, and every kind of caller."""

    async def run() -> None:
        given = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry")}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        try:
            callers = make_callers(trainer.worker.registry.tenancy)  # type: ignore[attr-defined]
            trainer.runtime.keyring.look()
            intake = Intake(60, 1 << 20)
            await test(create_public(trainer.runtime, intake), create_admin(trainer.runtime, intake), callers)
        finally:
            await trainer.close()

    asyncio.run(run())


def test_every_route_asks_every_caller(tmp_path: Path) -> None:
    denied = 0

    async def test(public: FastAPI, admin: FastAPI, callers: Callers) -> None:
        nonlocal denied
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
        told = await clients["public"].get("/jobs", headers=callers.headers["foreign"])
        assert told.json()["jobs"] == []

    with_trainer(tmp_path, test)
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        kept = [*map(registry.tenancy.denials, (None, "acme", "globex", "initech", "ops"))]
    assert sum(denial.count for denials in kept for denial in denials) == denied  # each, and nothing else


JOB: Final = "job-0"
NO_DATASET: Final = f"sha256:{'0' * 64}"
"""What nobody has."""
OTHERS: Final = (
    # method, path, status for the operator, for a stranger
    ("GET", "/jobs/{job}", 200, 404),
    ("GET", "/jobs/{job}/report", 409, 404),
    ("POST", "/jobs/{job}/cancel", 200, 404),
    ("GET", "/jobs/{job}/events", 200, 404),
    ("POST", "/jobs/{job}/retry", 200, 404),
    ("POST", "/jobs/{job}/cancel", 200, 404),
    ("DELETE", "/jobs/{job}", 204, 404),
    ("GET", "/jobs?tenant=acme", 200, 403),
    ("GET", "/datasets?tenant=acme", 200, 403),
    ("GET", "/datasets/{dataset}?tenant=acme", 200, 403),
    ("GET", "/datasets/{dataset}", 404, 404),
    ("DELETE", "/datasets/{dataset}?tenant=acme", 204, 403),
)
"""What an operator does with acme's jobs and datasets, one after the other, and what a stranger is told each time."""


def test_an_operator_sees_and_moves_what_is_anybodys_and_a_stranger_learns_nothing(tmp_path: Path) -> None:
    async def test(public: FastAPI, admin: FastAPI, callers: Callers) -> None:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(public), base_url="http://localhost")
        owner, stranger, operator = (callers.headers[name] for name in ("owner", "foreign", "operator"))
        dataset = (await client.post("/datasets", content=lines(3), headers=owner)).json()["dataset"]
        job = (await client.post("/jobs", json={"task": "e2e", "dataset": dataset}, headers=owner)).json()["id"]
        for what, inside in (("/jobs", "jobs"), ("/datasets", "datasets")):
            told = (await client.get(what, headers=operator)).json()[inside]
            assert [one["tenant"] for one in told] == ["acme"]
            assert (await client.get(f"{what}?tenant=globex", headers=operator)).json()[inside] == []
            assert len((await client.get(f"{what}?tenant=acme", headers=owner)).json()[inside]) == 1
            assert (await client.get(what, headers=stranger)).json()[inside] == []

        for method, path, by_operator, by_stranger in OTHERS:
            asked = path.format(job=job, dataset=dataset)
            refused = await client.request(method, asked, headers=stranger)
            assert refused.status_code == by_stranger, (method, path, refused.text)
            # The same words are for what nobody has.
            nothing = path.format(job=JOB, dataset=NO_DATASET).replace("acme", "nobody")
            unknown = await client.request(method, nothing, headers=stranger)
            assert words(refused).replace(job, JOB).replace(dataset, NO_DATASET) == words(unknown), (method, path)
            if path.endswith("events"):
                async with client.stream(method, asked, headers=operator) as answer:
                    assert answer.status_code == by_operator
                    continue
            answer = await client.request(method, asked, headers=operator)
            assert answer.status_code == by_operator, (method, path, answer.text)
        for what, inside in (("/jobs", "jobs"), ("/datasets", "datasets")):
            assert (await client.get(what, headers=owner)).json()[inside] == []

    def words(answer: httpx.Response) -> str:
        error = answer.json()["error"]
        return f"{answer.status_code} {error['code']} {error['message']} {error['detail']}"

    with_trainer(tmp_path, test)


def test_a_rebound_name_reads_nothing_of_an_open_trainer(tmp_path: Path) -> None:
    """A page whose name leads to 127.0.0.1 could read the metrics: they passed for a probe."""

    async def run() -> None:
        given = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry")}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        try:
            app = create_admin(trainer.runtime, Intake(60, 1 << 20))
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
            for path, status in (("/metrics", 403), ("/openapi.json", 403), ("/health", 200), ("/ready", 200)):
                assert (await client.get(path)).status_code == 200
                rebound = await client.get(path, headers={"host": "evil.example"})
                assert rebound.status_code == status, path
        finally:
            await trainer.close()

    asyncio.run(run())
