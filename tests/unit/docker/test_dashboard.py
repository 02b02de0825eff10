"""The dashboard and the alert rules: every query names metrics and labels that a running process exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from tests.support.paths import ROOT
from tests.support.server import ServerProcess, TinyWorld, make_world, upload
from tests.support.trainer_process import TrainerProcess, restaurants, wait_for

BOARD: Final = ROOT / "docker/grafana/dashboards/prefixd.json"
ALERTS: Final = ROOT / "docker/prometheus/alerts.yml"
ALERTS_PAGE: Final = ROOT / "docs/alerts.md"

BY_PROMETHEUS: Final = {"up": {"job", "instance"}}
"""What Prometheus itself adds, and the labels that it puts on everything."""
TARGET_LABELS: Final = {"job", "instance"}

_WORDS: Final = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_GROUPING: Final = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR: Final = re.compile(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?\s*(\(?)")
_SUFFIXES: Final = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "gauge": ("",),
}


def panels() -> list[dict[str, Any]]:
    """All of the board's but its rows."""
    return [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    """All alert rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def queries() -> dict[str, str]:
    """Every query by where it stands, the board's variables among them."""
    found = {f"panel {p['title']} {t['refId']}": t["expr"] for p in panels() for t in p["targets"]}
    for variable in json.loads(BOARD.read_text())["templating"]["list"]:
        found[f"variable {variable['name']}"] = variable["query"]["query"]
    return {**found, **{f"alert {rule['alert']}": rule["expr"] for rule in rules()}}


def metrics_of(query: str) -> dict[str, set[str]]:
    """The metrics that a query names, each with the labels that its selector asks for."""
    query = re.sub(r"^label_values\((.*),\s*(\w+)\)$", r"sum by (\2) (\1)", query)
    bare = _GROUPING.sub(" ", re.sub(r"\[[^\]]*\]", "", query))
    bare = re.sub(r'"[^"]*"', lambda quoted: '""', bare)
    found: dict[str, set[str]] = {}
    for name, selector, call in _SELECTOR.findall(bare):
        if name not in _WORDS and not call:
            found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
    return found


def groupings_of(query: str) -> set[str]:
    """The labels that a query groups by."""
    return {label.strip() for _, labels in _GROUPING.findall(query) for label in labels.split(",") if label.strip()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, set[str]]]:
    """Every sample's name with its labels by Prometheus' job, from the admin ports of processes that have worked."""
    folder = tmp_path_factory.mktemp("dashboard")
    world = make_world(folder / "model")
    return {"prefixd": _of_a_server(folder, world), "prefixd-trainer": _of_a_trainer(folder, world)}


def _of_a_server(folder: Path, world: TinyWorld) -> dict[str, set[str]]:
    arguments = ("--backbone", str(world.folder), "--registry", str(folder / "registry"), "--disk-cache")
    with ServerProcess(folder, *arguments, str(folder / "cache")) as server:
        server.wait_ready()
        with server.client() as client:
            assert upload(client, "a", world.prefix()).is_success
            for body in ({"task": "a"}, {}, {"task": "nobody"}):
                client.post("/generate", json={**body, "input": "x", "parameters": {"max_new_tokens": 4}})
        with server.admin_client() as client:
            return _samples(client)


def _of_a_trainer(folder: Path, world: TinyWorld) -> dict[str, set[str]]:
    """While it trains: a job's own numbers are there as long as it runs."""
    places = ("--data", str(folder / "data"), "--registry", str(folder / "registry"))
    with TrainerProcess(folder, *places, "--backbone", f"tiny={world.folder}") as trainer:
        trainer.wait_ready()
        trainer.submit("a", trainer.upload(restaurants(40)), hyperparameters={"epochs": 500, "validate_every": 1})
        wait_for(lambda: "prefixd_trainer_job_validation_loss{" in trainer.metrics(), 90, trainer.log.read_text)
        with trainer.admin_client() as client:
            return _samples(client)


def _samples(client: httpx.Client) -> dict[str, set[str]]:
    """Families without samples count by their declared type, and may have any label."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for suffix in _SUFFIXES.get(family.type, ()):
            found.setdefault(family.name + suffix, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("place", queries())
def test_every_query_names_metrics_and_labels_that_a_running_process_exports(
    place: str, exported: dict[str, dict[str, set[str]]]
) -> None:
    query = queries()[place]
    named = metrics_of(query)
    assert named, f"no metric found in {query!r}"
    asked = re.findall(r'job="([^"]+)"', query)
    assert set(asked) <= set(exported), f"expected jobs among {sorted(exported)}, got {query!r}"
    found = {name: labels for job in asked or exported for name, labels in exported[job].items()}
    known = {**{name: labels | TARGET_LABELS for name, labels in found.items()}, **BY_PROMETHEUS}
    for metric, labels in named.items():
        assert metric in known, f"expected a metric that is exported, got {metric} in {query!r}"
        if found.get(metric):
            wanted = labels | (groupings_of(query) if len(named) == 1 else set())
            assert wanted <= known[metric], f"expected labels of {metric} {sorted(known[metric])}, got {sorted(wanted)}"


@pytest.mark.parametrize("place", queries())
def test_a_metric_that_servers_and_trainers_have_is_asked_for_by_job(
    place: str, exported: dict[str, dict[str, set[str]]]
) -> None:
    """Or the ones' requests count as the others'."""
    both = set.intersection(*(set(names) for names in exported.values())) | set(BY_PROMETHEUS)
    query = queries()[place]
    for metric, labels in metrics_of(query).items():
        assert metric not in both or "job" in labels, f"expected {metric} with a job, got {query!r}"


def test_no_metric_has_a_label_that_prometheus_would_rename(exported: dict[str, dict[str, set[str]]]) -> None:
    names = {**exported["prefixd"], **exported["prefixd-trainer"]}
    assert {name: labels & TARGET_LABELS for name, labels in names.items() if labels & TARGET_LABELS} == {}


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ('sum by (le, task) (rate(a_bucket{instance=~"$instance",x="b"}[5m])) > 0.5', {"a_bucket": {"instance", "x"}}),
        ("histogram_quantile(0.95, sum(rate(a_bucket[$__rate_interval]))) / b", {"a_bucket": set(), "b": set()}),
        ('absent(up{job="x"} == 1)', {"up": {"job"}}),
        ("a == 0 and on (instance) b == 1", {"a": set(), "b": set()}),
        ('label_values(up{job="x"}, instance)', {"up": {"job"}}),
        ("max_over_time(sum(a)[30m:1m])", {"a": set()}),
    ],
)
def test_the_reader_of_queries_finds_metrics_and_nothing_else(query: str, wanted: dict[str, set[str]]) -> None:
    assert metrics_of(query) == wanted


def test_prometheus_scrapes_the_jobs_that_the_queries_ask_for(exported: dict[str, dict[str, set[str]]]) -> None:
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    assert {scraped["job_name"] for scraped in config["scrape_configs"]} == set(exported)


def test_the_board_shows_what_an_operator_asks_for() -> None:
    text = " ".join(f"{p['title']} {p['description']}" for p in panels()).lower()
    wanted = (
        "time to first token", "inter-token latency", "distinct tasks per step", "kv memory", "prefixes by tier",
        "by task", "queue", "registry age", "registry errors", "tokens", "requests", "open jobs by state", "queue age",
        "loss by job", "jobs ended, by state and code",
    )  # fmt: skip
    assert [words for words in wanted if words not in text] == []


def test_panels_do_not_overlap_and_have_units_and_descriptions() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(BOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": _datasource()}, panel["title"]


def _datasource() -> str:
    file = ROOT / "docker/grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(file.read_text())["datasources"]
    return str(source["uid"])


def test_every_alert_has_its_paragraph_and_every_paragraph_its_alert() -> None:
    chapter = re.search(r"^## Alerts$(.*?)(?=^## |\Z)", ALERTS_PAGE.read_text(), re.M | re.S)
    assert chapter is not None
    paragraphs = dict(re.findall(r"^### (\w+)\n+(.+)", chapter[1], re.M))
    assert set(paragraphs) == {rule["alert"] for rule in rules()}
    for rule in rules():
        assert len(paragraphs[rule["alert"]]) > 80, f"{rule['alert']}: expected a paragraph that helps"
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert Path(ROOT / path) == ALERTS_PAGE and anchor == rule["alert"].lower(), rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"], rule["alert"]
