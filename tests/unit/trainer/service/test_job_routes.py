"""``/jobs`` in this process, without workers: what is refused at submission, and lists."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.datasets import lines
from tests.support.refused_defaults import DEEP, REFUSED_DEFAULTS
from trainer.jobs.base import JobStore
from trainer.jobs.job import new_job
from trainer.jobs.record import Change
from trainer.service.app import create_public
from trainer.service.assembly import assemble
from trainer.service.job_pages import PAGE_BYTES
from trainer.service.schemas import Evaluation, Hyperparameters, JobBody
from trainer.service.settings import TrainerSettings

Test = Callable[[httpx.AsyncClient, JobStore, str], Coroutine[Any, Any, None]]


def with_trainer(tmp_path: Path, test: Test, max_open_jobs: int = 1000) -> None:
    """Run ``test`` with a client, the store and the digest of a dataset. An exception in a route is an answer 500."""

    async def run() -> None:
        places = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry")}
        given = {**places, "max_open_jobs": max_open_jobs}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        transport = httpx.ASGITransport(create_public(trainer.runtime, Intake(60, 1 << 20)), raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                dataset = (await client.post("/datasets", content=lines(3))).json()["dataset"]
                await test(client, trainer.runtime.service.store, dataset)
        finally:
            await trainer.close()

    asyncio.run(run())


@pytest.mark.parametrize("defaults", REFUSED_DEFAULTS, ids=range(len(REFUSED_DEFAULTS)))
def test_defaults_that_no_server_takes_are_refused_at_submission(tmp_path: Path, defaults: str) -> None:
    """Such a job was trained and published, and failed every plain request, or failed behind its last step."""

    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        answer = await submit(client, f'{{"task": "e2e", "dataset": "{dataset}", "defaults": {defaults}}}')
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["code"] in ("invalid_parameter", "invalid_request")
        assert len(answer.content) < 3000
        assert await store.jobs("default", limit=1) == []

    with_trainer(tmp_path, test)


@pytest.mark.parametrize("name", ["warmup_steps", "validate_every", "checkpoint_every", "seed"])
def test_a_number_that_no_artifact_holds_is_refused_at_submission(tmp_path: Path, name: str) -> None:
    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        body = {"task": "e2e", "dataset": dataset, "hyperparameters": {name: 10**30}}
        answer = await client.post("/jobs", json=body)
        assert (answer.status_code, name in answer.json()["error"]["message"]) == (422, True)

    with_trainer(tmp_path, test)


@pytest.mark.parametrize("text", ["\u200b", "\ufeffwords"])
@pytest.mark.parametrize("field", ["start_text", "init"])
def test_a_text_to_start_from_is_one(tmp_path: Path, field: str, text: str) -> None:
    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        given = {"hyperparameters": {"init": text}} if field == "init" else {field: text}
        answer = await client.post("/jobs", json={"task": "e2e", "dataset": dataset, **given})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")

    with_trainer(tmp_path, test)


async def submit(client: httpx.AsyncClient, body: str) -> httpx.Response:
    return await client.post("/jobs", content=body, headers={"content-type": "application/json"})


FIELDS = (
    *((name,) for name in JobBody.model_fields),
    *(("hyperparameters", name) for name in Hyperparameters.model_fields),
    *(("evaluation", name) for name in Evaluation.model_fields),
    ("unknown",),
)
ODD = (
    DEEP, f'{{"a": {DEEP}}}', f"{10**600}", f"-{10**600}", f"{10**4000}", "9" * 5000, "1e308", "1e999", "NaN",
    "Infinity", r'"\ud800"', r'"\u0000"', r'"\ufeff"', r'"\u200b"', '""', "[]", "{}", "true", "-1", "[null]",
    r'["\ud800"]', r'{"\ud800": "\ud800"}', f'"{"9" * 5000}"', "[" * 100_000,
)  # fmt: skip


def test_no_value_of_any_field_is_an_internal_error(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        for path in FIELDS:
            for value in ODD:
                body: dict[str, Any] = {"task": "e2e", "dataset": dataset, path[0]: "HERE"}
                if len(path) == 2:
                    body[path[0]] = {path[1]: "HERE"}
                answer = await submit(client, json.dumps(body).replace('"HERE"', value))
                assert answer.status_code in (201, 400, 404, 422), (path, value[:40], answer.text)
        listed = await client.get("/jobs", params={"limit": 1000})
        assert listed.status_code == 200

    with_trainer(tmp_path, test)


def test_a_page_of_a_state_holds_only_its_jobs_and_as_many_as_were_asked_for(tmp_path: Path) -> None:
    """Pages were filtered after they were cut: with 100 newer jobs, the first page of a state was empty."""

    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        made = [
            (await client.post("/jobs", json={"task": "e2e", "dataset": dataset, "evaluation": None})).json()["id"]
            for _ in range(12)
        ]
        for job_id in (*made[:3], made[5]):
            await store.change("default", job_id, lambda job: Change(replace(job, state="failed")))
        pages = []
        before: str | None = None
        while True:
            wanted: dict[str, Any] = {"state": "failed", "limit": 2, **({"before": before} if before else {})}
            page = (await client.get("/jobs", params=wanted)).json()
            pages.append([job["id"] for job in page["jobs"]])
            before = page["next"]
            if before is None:
                break
        assert pages == [[made[5], made[2]], [made[1], made[0]]]
        assert (await client.get("/jobs", params={"state": "running"})).json() == {"jobs": [], "next": None}

    with_trainer(tmp_path, test)


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("fields", "largest"),
    [
        ({"template": f"{LONG} {{input}}"}, "template"),
        ({"template": "x" * 60_000 + "{input}", "start_text": "words " * 1600}, "template"),
        ({"template": "\u20ac" * 30_000 + "{input}"}, "template"),
    ],
)  # fmt: skip
def test_a_job_is_only_as_large_as_a_record_may_be(tmp_path: Path, fields: dict[str, Any], largest: str) -> None:
    """A template of 100,000 characters was kept, and every trainer read it every two seconds."""

    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        answer = await client.post("/jobs", json={"task": "e2e", "dataset": dataset, **fields})
        error = answer.json()["error"]
        assert answer.status_code == 422 and largest in error["message"], error
        assert "65536" in error["message"], "what was expected"
        assert len(answer.content) < 1000
        assert await store.jobs("default", limit=1) == []
        fitting = {"task": "e2e", "dataset": dataset, "template": "x" * 60_000 + "{input}"}
        fits = await client.post("/jobs", json=fitting)
        assert fits.status_code == 201, fits.text

    with_trainer(tmp_path, test)


def test_a_page_of_large_jobs_ends_early_and_the_pages_hold_all(tmp_path: Path) -> None:
    """A page of 1,000 jobs was one answer of 100 MB, made on the event loop."""

    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        spec = {"task": "default/e2e", "template": "x" * 60_000}
        made = [(await store.create(new_job("default", "me", spec))).id for _ in range(40)]
        pages = []
        before: str | None = None
        while True:
            wanted: dict[str, Any] = {"limit": 1000, **({"before": before} if before else {})}
            answer = await client.get("/jobs", params=wanted)
            assert len(answer.content) < PAGE_BYTES + 100_000
            pages.append([job["id"] for job in answer.json()["jobs"]])
            before = answer.json()["next"]
            if before is None:
                break
        assert sorted(job for page in pages for job in page) == sorted(made)
        assert len(pages) == 3

    with_trainer(tmp_path, test)


def test_a_retry_counts_as_an_open_job(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        body = {"task": "e2e", "dataset": dataset, "evaluation": None}
        first, second = [(await client.post("/jobs", json=body)).json()["id"] for _ in range(2)]
        assert (await client.post("/jobs", json=body)).status_code == 429
        assert (await client.post(f"/jobs/{first}/cancel")).status_code == 200
        assert (await client.post("/jobs", json=body)).status_code == 201
        refused = await client.post(f"/jobs/{first}/retry")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert (await client.post(f"/jobs/{second}/cancel")).status_code == 200
        assert (await client.post(f"/jobs/{first}/retry")).status_code == 200

    with_trainer(tmp_path, test, max_open_jobs=2)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/jobs?state=queued&state=running", "state: expected it once"),
        ("/datasets?tenant=acme&tenant=globex", "tenant: expected it once"),
        ("/jobs?tenent=acme", "tenent: unknown field"),
        ("/datasets?limit=1", "limit: unknown field"),
    ],
)
def test_a_query_that_would_not_be_followed_is_refused(tmp_path: Path, path: str, told: str) -> None:
    async def test(client: httpx.AsyncClient, store: JobStore, dataset: str) -> None:
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
        assert answer.json()["error"]["message"].startswith(told)

    with_trainer(tmp_path, test)
