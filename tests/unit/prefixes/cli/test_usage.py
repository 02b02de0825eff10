"""``prefixd usage``: the same rows as a table, CSV and JSON, with costs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefixes.cli import usage as command
from prefixes.registry import open_registry
from prefixes.remote_usage import RemoteUsage
from prefixes.usage.model import Counts, Kind, today
from prefixes.usage.table import summed
from tests.support.usage import batch, subject
from tests.unit.prefixes.cli.test_keys import Shell

PRICES = 'currency = "EUR"\n[default]\nper_1000_output_tokens = "0.5"\nper_training_step = "0.1"\n'


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with closing(open_registry(f"disk://{tmp_path}/registry")) as registry:
        registry.usage.add(batch(1, {
            subject(): Counts(2, 10, 4, 1000), subject("globex", None, key=None): Counts(1, 1, 0, 3),
            subject("acme", "acme/new", kind=Kind.TRAINING): Counts(0, 0, 0, 0, 1, 7, 70, 1500),
            subject("acme", key=None, kind=Kind.SHARED): Counts(5, 5, 5, 5),
        }))  # fmt: skip
        (tmp_path / "prices.toml").write_text(PRICES)
        yield Shell(tmp_path / "registry")


def test_json_has_everything_exactly(shell: Shell, tmp_path: Path) -> None:
    answer = shell.json("usage", "--by", "tenant,task", "--price-file", str(tmp_path / "prices.toml"))
    rows = [(row["tenant"], row["task"], row["requests"], row["training_steps"], row["cost"]) for row in answer["rows"]]
    assert rows == [
        ("acme", "acme/e2e", 2, 0, "0.5"), ("acme", "acme/new", 0, 7, "0.7"), ("globex", None, 1, 0, "0.0015")
    ]  # fmt: skip
    assert (answer["total"]["cost"], answer["currency"], answer["of_shared"]) == ("1.2015", "EUR", [])
    assert shell.json("usage", "--tenant", "acme")["of_shared"][0]["requests"] == 5


def test_csv_is_for_programs(shell: Shell, tmp_path: Path) -> None:
    text = shell.run("usage", "--csv", "--by", "task,key", "--price-file", str(tmp_path / "prices.toml")).stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["task"], row["key"], row["output_tokens"], row["cost_EUR"]) for row in rows] == [
        ("", "", "3", "0.0015"), ("acme/e2e", "AAAAAAAAAAAA", "1000", "0.5"), ("acme/new", "AAAAAAAAAAAA", "0", "0.7")
    ]  # fmt: skip
    assert rows[2]["training_seconds"] == "1.5"


def test_a_table_is_for_people(shell: Shell) -> None:
    lines = shell.run("usage", "--tenant", "acme").stdout.splitlines()
    assert lines[0].startswith(f"acme, {today()[:8]}01 to {today()}")
    assert lines[1].split()[:2] == ["task", "requests"] and "training steps" in lines[1]
    assert [line.split()[:2] for line in lines[2:5]] == [["acme/e2e", "2"], ["acme/new", "0"], ["total", "2"]]
    assert lines[6] == "of shared tasks, by other tenants:"
    plain = shell.run("usage", "--tenant", "globex").stdout
    assert "training" not in plain and "shared" not in plain


def test_no_days_no_rows_and_bad_days_are_named(shell: Shell) -> None:
    assert shell.json("usage", "--from", "2020-01-01", "--to", "2020-01-31")["rows"] == []
    assert "expected a day as 2026-01-31" in shell.run("usage", "--from", "yesterday", code=1).stderr
    assert "--csv and --json" in shell.run("usage", "--csv", "--json", code=2).stderr


def test_a_servers_answer_is_priced_here_by_tenant_and_task(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        query = dict(request.url.params)
        asked.append(query)
        with closing(open_registry(shell.registry)) as registry:
            days = query["from"], query["to"]
            rows = registry.usage.read(*days)
            return httpx.Response(200, json=summed(rows, *days, by=query["by"].split(",")))

    def remote(url: str, *, api_key: str | None) -> RemoteUsage:
        client = httpx.Client(transport=httpx.MockTransport(answer), base_url=url)
        return RemoteUsage(url, api_key=api_key, client=client)

    monkeypatch.setattr(command, "RemoteUsage", remote)
    prices = ("--price-file", str(tmp_path / "prices.toml"))
    here = shell.json("usage", "--by", "day", *prices)
    shell.env |= {"PREFIXD_REGISTRY": None, "PREFIXD_SERVER": "http://there"}
    assert shell.json("usage", "--by", "day", *prices) == here
    assert asked[-1]["by"] == "day,tenant,task"
    assert "cost" not in shell.json("usage", "--by", "day")["total"] and asked[-1]["by"] == "day"
