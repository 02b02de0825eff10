"""docs/api.md, docs/deploy.md and docs/alerts.md name everything that there is."""

from __future__ import annotations

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from prefixes.parameters import DECODING_PARAMETERS
from prefixes.registry.redis.url import OPTIONS, SCHEMES
from server.engine.types import EngineStats
from server.metrics import EngineMetrics, EngineStateCollector
from server.registry.link import LinkState
from server.registry.metrics import LinkCollector, RegistryMetrics
from server.routes import admin, audit, generate, keys, openai, operations, prefixes, task_changes, usage
from server.tiers.metrics import TierCollector
from server.tiers.tiers import PrefixTiers
from server.web.errors import STATUSES
from server.web.http_metrics import HttpMetrics
from tests.support.paths import ROOT

DOCS = (ROOT / "docs" / "api.md").read_text()
ALERTS = (ROOT / "docs" / "alerts.md").read_text()
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()


def test_every_error_code_is_documented_with_its_status() -> None:
    for code, status in STATUSES.items():
        (line,) = [line for line in DOCS.splitlines() if line.startswith("|") and f"`{code}`" in line.split("|")[1]]
        assert str(status) in line.split("|")[2], code


def test_every_parameter_is_documented() -> None:
    assert [name for name in DECODING_PARAMETERS if f"`{name}`" not in DOCS] == []


def test_every_route_is_documented() -> None:
    app = FastAPI()
    for module in (generate, prefixes, task_changes, openai, keys, audit, usage, operations, admin):
        app.include_router(module.router)
    for path, methods in app.openapi()["paths"].items():
        documented = path.replace("/prefixes/{name}", "/prefixes/{tenant}/{name}")
        for method in methods:
            assert f"`{method.upper()} {documented}`" in DOCS, (method, path)


def test_every_metric_is_documented() -> None:
    registry = CollectorRegistry()
    EngineMetrics(max_task_labels=1, max_tenant_labels=1).begin(registry)
    HttpMetrics(registry)
    stats = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0)
    registry.register(EngineStateCollector(lambda: stats, lambda: 0.0, str))
    registry.register(TierCollector(PrefixTiers(lambda tenant, version: b"", ()).stats, lambda: stats))
    RegistryMetrics(registry)
    registry.register(LinkCollector(lambda: LinkState(True, 0.0, False, True), lambda: True, lambda: True))
    for metric in registry.collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        assert f"`{name}`" in ALERTS, name


def test_every_form_and_option_of_a_registry_url_is_documented() -> None:
    for scheme in SCHEMES:
        assert f"`{scheme.replace('rediss', 'redis')}://" in DEPLOY, scheme
    assert [option for option in OPTIONS if f"`{option}`" not in DEPLOY] == []
