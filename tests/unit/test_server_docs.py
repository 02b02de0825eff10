"""docs/api.md names everything that there is."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from prefixes.parameters import DECODING_PARAMETERS
from server.engine.engine import EngineStats
from server.errors import STATUSES
from server.http_metrics import HttpMetrics
from server.metrics import EngineMetrics, EngineStateCollector
from server.routes import generate, openai, operations, prefixes

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def test_every_error_code_is_documented_with_its_status() -> None:
    for code, status in STATUSES.items():
        (line,) = [line for line in DOCS.splitlines() if line.startswith("|") and f"`{code}`" in line.split("|")[1]]
        assert str(status) in line.split("|")[2], code


def test_every_parameter_is_documented() -> None:
    assert [name for name in DECODING_PARAMETERS if f"`{name}`" not in DOCS] == []


def test_every_route_is_documented() -> None:
    app = FastAPI()
    for module in (generate, prefixes, openai, operations):
        app.include_router(module.router)
    for path, methods in app.openapi()["paths"].items():
        documented = path.replace("/prefixes/{name}", "/prefixes/{tenant}/{name}")
        for method in methods:
            assert f"`{method.upper()} {documented}`" in DOCS, (method, path)


def test_every_metric_is_documented() -> None:
    registry = CollectorRegistry()
    EngineMetrics(max_task_labels=1).begin(registry)
    HttpMetrics(registry)
    registry.register(EngineStateCollector(lambda: EngineStats(0, 0, 0.0, 0, 0)))
    for metric in registry.collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        assert f"`{name}`" in DOCS, name
