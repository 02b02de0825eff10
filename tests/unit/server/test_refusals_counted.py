"""Refusals in metrics: what a limit of the caller's own refused is told apart, and pages nobody."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from prefixes.tenancy.directory import Directory, NewKey
from prefixes.tenancy.limits import Limits
from tests.support.apps import Served, with_apps
from tests.support.callers import bearer
from tests.support.limits import set_limits
from tests.support.paths import ROOT

BODY = {"input": "x", "parameters": {"max_new_tokens": 1}}
NAME = "prefixd_http_requests_total"


def part_refused(metrics: str) -> float:
    """What the alert compares, of all requests so far."""
    groups = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())["groups"]
    (expr,) = [rule["expr"] for group in groups for rule in group["rules"] if rule["alert"] == "RequestsRefused"]
    found = re.fullmatch(r"sum\(rate\((\S+)\[5m\]\)\) / sum\(rate\((\S+)\[5m\]\)\) > 0.05", expr)
    assert found is not None, expr
    refused, all_of_them = (counted(metrics, selector) for selector in found.groups())
    return refused / all_of_them


def counted(metrics: str, selector: str) -> float:
    """The sum of the series that Prometheus would select."""
    wanted = re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selector.removeprefix(NAME))
    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == NAME and all(matches({"job": "prefixd", **sample.labels}, *one) for one in wanted)
    )


def matches(labels: dict[str, str], name: str, how: str, value: str) -> bool:
    same = re.fullmatch(value if "~" in how else re.escape(value), labels.get(name, "")) is not None
    return same != how.startswith("!")


class Asked:
    """A server whose tenant acme has a key."""

    def __init__(self, served: Served) -> None:
        self._served, self._store = served, served.assembled.link.registry.tenancy
        self.key: NewKey = Directory(self._store).create_key("acme", "ci", ["generate"], actor="test")
        operator = Directory(self._store).create_key("default", "op", ["operator"], actor="test")
        self._operator = bearer(operator.secret)

    def limit(self, **limits: Any) -> None:
        set_limits(self._store, **limits)
        self._served.assembled.keyring.look()

    async def post(self, path: str = "/generate", body: Any = None) -> httpx.Response:
        return await self._served.public.post(path, json=body or BODY, headers=bearer(self.key.secret))

    async def metrics(self) -> str:
        return (await self._served.admin.get("/metrics", headers=self._operator)).text


@pytest.mark.parametrize("of", ["tenant", "key"])
@pytest.mark.parametrize(
    ("limit", "code"), [(Limits(requests_per_minute=1), "rate_limited"), (Limits(requests_waiting=0), "queue_full")]
)
def test_a_caller_above_its_own_limit_pages_nobody(tmp_path: Path, of: str, limit: Limits, code: str) -> None:
    async def test(served: Served) -> None:
        asked = Asked(served)
        assert (await asked.post()).status_code == 200
        asked.limit(**{"tenants": {"acme": limit}} if of == "tenant" else {"keys": {asked.key.key.id: limit}})
        model = served.assembled.settings.backbone_name
        answers = [await asked.post() for _ in range(20)]
        await asked.post("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 1})
        error = answers[-1].json()["error"]
        assert (answers[-1].status_code, error["code"], error["detail"]["of"]) == (429, code, of)
        assert error["detail"]["limit"] in ("requests_per_minute", "requests_waiting")
        metrics = await asked.metrics()
        assert counted(metrics, f'{{status="429",limit_of="{of}"}}') >= 20
        assert counted(metrics, f'{{status="429",route="/v1/completions",limit_of="{of}"}}') == 1
        assert part_refused(metrics) == 0

    with_apps(tmp_path, test)


def test_a_full_queue_counts_and_a_flood_above_its_own_limit_does_not_hide_it(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        asked = Asked(served)
        for _ in range(3):
            assert (await asked.post()).status_code == 200
        with mock.patch.object(served.assembled.engine, "waiting", lambda *whose: 10**6):
            assert (await asked.post()).json()["error"]["code"] == "queue_full"
        asked.limit(tenants={"acme": Limits(requests_per_minute=1)})
        assert [(await asked.post()).status_code for _ in range(30)] == [200] + [429] * 29
        assert part_refused(await asked.metrics()) == pytest.approx(1 / 5)

    with_apps(tmp_path, test)
