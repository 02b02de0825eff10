"""``GET /usage``: whose usage a caller sees, and what it says."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import read_prefix, version_of
from prefixes.usage.model import Kind, today
from server.web.auth import ANYBODY
from server.web.settings_sources import InvalidSettings
from tests.support.apps import Served, with_apps
from tests.support.callers import make_callers
from tests.support.usage import batch, random_counts, subject

PRICES = 'currency = "EUR"\n[default]\nper_1000_output_tokens = 1\n'


async def generated(served: Served, headers: dict[str, str], task: str | None, times: int = 1) -> dict[str, int]:
    """The sums of what the answers say."""
    total = {"requests": 0, "input_tokens": 0, "prefix_tokens": 0, "output_tokens": 0}
    for number in range(times):
        body = {"task": task, "input": "x" * (1 + number), "parameters": {"max_new_tokens": 2}}
        answer = await served.public.post("/generate", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        total["requests"] += 1
        for name, value in answer.json()["usage"].items():
            total[name] += value
    return total


async def asked(served: Served, headers: dict[str, str], requests: int, query: str = "") -> Any:
    """The answer, once it has so many requests."""
    deadline = time.monotonic() + 60
    while True:
        answer = await served.public.get(f"/usage{query}", headers=headers)
        assert answer.status_code == 200, answer.text
        if answer.json()["total"]["requests"] == requests:
            return answer.json()
        assert time.monotonic() < deadline, answer.text
        await asyncio.sleep(0.02)


def counts(row: dict[str, Any]) -> dict[str, int]:
    """A row's numbers of requests."""
    return {name: row[name] for name in ("requests", "input_tokens", "prefix_tokens", "output_tokens")}


def test_each_tenant_sees_its_own_and_an_owner_what_others_used_of_its_task(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        registry = served.assembled.link.registry
        registry.publish("acme", "e2e", served.data, record={})
        callers = make_callers(registry.tenancy)
        served.assembled.keyring.look()
        owner, foreign, operator = (callers.headers[name] for name in ("owner", "foreign", "operator"))
        await served.public.post("/prefixes/e2e/share", json={"tenants": ["globex"]}, headers=owner)
        mine = await generated(served, owner, "e2e", 3)
        theirs = await generated(served, foreign, "acme/e2e", 2)
        bare = await generated(served, foreign, None)
        refused = await served.public.post("/generate", json={"task": "none", "input": "x"}, headers=owner)
        assert refused.status_code == 404  # and counts nowhere

        await asked(served, operator, 6)  # all are handed over
        own = await asked(served, owner, 3)
        assert [(row["task"], counts(row)) for row in own["rows"]] == [("acme/e2e", mine)]
        assert [(row["task"], counts(row)) for row in own["of_shared"]] == [("acme/e2e", theirs)]
        assert (own["tenant"], own["by"], own["currency"]) == ("acme", ["task"], None)
        wide = await served.public.get("/usage?by=day,tenant,key,task,version,outcome,kind", headers=owner)
        assert "globex" not in wide.text and callers.foreign not in wide.text
        [row] = wide.json()["rows"]
        key = (await served.public.get("/caller", headers=owner)).json()["key_id"]
        version = version_of(read_prefix(served.data))
        assert [row[name] for name in wide.json()["by"]] == [
            today(), "acme", key, "acme/e2e", version, "finished", "generation"
        ]  # fmt: skip

        other = await asked(served, foreign, 3)
        assert [(row["task"], counts(row)) for row in other["rows"]] == [(None, bare), ("acme/e2e", theirs)]
        assert other["of_shared"] == []
        everyones = await asked(served, operator, 6, "?by=tenant")
        assert [(row["tenant"], row["requests"]) for row in everyones["rows"]] == [("acme", 3), ("globex", 3)]
        one = await asked(served, operator, 3, "?tenant=acme")
        assert one["of_shared"] == own["of_shared"]
        stranger = await served.public.get("/usage?tenant=acme", headers=foreign)
        assert stranger.status_code == 403

    with_apps(tmp_path, test, usage_flush_s=0.02)


def test_an_open_server_counts_to_the_default_tenant_and_no_key(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        total = await generated(served, {}, "e2e", 2)
        answer = await asked(served, {}, 2, "?by=tenant,key,task")
        [row] = answer["rows"]
        assert (row["tenant"], row["key"], row["task"]) == ("default", None, "default/e2e")
        assert counts(row) == total == counts(answer["total"])

    with_apps(tmp_path, test, usage_flush_s=0.02)


def test_a_stream_that_is_cut_is_billed_for_what_it_got(tmp_path: Path) -> None:
    """The client leaves; the server's record is of an aborted request, with fewer tokens than it asked for."""

    async def test(served: Served) -> None:
        engine = served.apps.public.state.runtime.engine
        service = served.apps.public.state.runtime.service
        wanted = {"max_new_tokens": 50, "min_new_tokens": 50}
        running = await service.admit(ANYBODY, "e2e", "xy", wanted, "id", lambda _: None)
        got = len((await anext(running.stream)).token_ids)
        running.stream.abort()
        async for event in running.stream:
            got += len(getattr(event, "token_ids", ()))
        assert engine.healthy
        answer = await asked(served, {}, 1, "?by=outcome")
        [row] = answer["rows"]
        assert (row["outcome"], row["input_tokens"], row["output_tokens"]) == ("aborted", 2, got) and got < 50

    with_apps(tmp_path, test, usage_flush_s=0.02)


def test_costs_come_with_a_price_file(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)

    async def test(served: Served) -> None:
        await generated(served, {}, "e2e", 2)
        answer = await asked(served, {}, 2)
        assert answer["currency"] == "EUR"
        assert answer["rows"][0]["cost"] == answer["total"]["cost"] == f"{answer['total']['output_tokens'] / 1000:g}"

    with_apps(tmp_path, test, usage_flush_s=0.02, price_file=str(tmp_path / "prices.toml"))


def test_a_server_does_not_start_with_a_price_file_that_is_none(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        raise AssertionError("it started")

    with pytest.raises(InvalidSettings, match="price_file"):
        with_apps(tmp_path, test, price_file=str(tmp_path / "absent.toml"))


@pytest.mark.parametrize(
    ("query", "status", "named"),
    [
        ("?from=2026-02-30", 422, "from"), ("?to=today", 422, "to"), ("?from=2026-02-01&to=2026-01-01", 422, "from"),
        ("?by=owner", 422, "by"), ("?tenant=../x", 422, "tenant"), ("?form=2026-01-01", 422, "form"),
        ("?from=2026-01-01&to=2026-01-31&by=day,task", 200, "2026-01-31"),
    ],
)  # fmt: skip
def test_a_bad_question_is_named(tmp_path: Path, query: str, status: int, named: str) -> None:
    async def test(served: Served) -> None:
        answer = await served.public.get(f"/usage{query}")
        assert (answer.status_code, named in answer.text) == (status, True), answer.text

    with_apps(tmp_path, test)


def test_training_is_in_the_same_answer(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        found = random_counts(random.Random(0))
        served.assembled.link.registry.usage.add(batch(1, {subject("default", kind=Kind.TRAINING): found}))
        answer = (await served.public.get("/usage?by=kind")).json()
        [row] = answer["rows"]
        assert (row["kind"], row["jobs"], row["training_steps"]) == ("training", found.jobs, found.training_steps)
        assert row["training_seconds"] == found.training_ms / 1000

    with_apps(tmp_path, test)


def test_a_misspelt_name_in_the_query_gets_a_guess(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        for misspelt, meant in (("form", "from"), ("tenent", "tenant")):
            answer = await served.public.get(f"/usage?{misspelt}=x")
            assert answer.status_code == 422, answer.text
            assert answer.json()["error"]["message"] == f"{misspelt}: unknown field; did you mean {meant}?"

    with_apps(tmp_path, test)
