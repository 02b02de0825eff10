"""The eval gate through a real trainer: which versions get the alias, what is said of it, and what a kill changes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from prefixes.registry import open_registry
from prefixes.registry.base import AuditEntry, TaskInfo
from tests.support.server import TinyWorld, make_world
from tests.support.trainer_process import PATIENCE_S, Start, TrainerProcess, trainers, wait_for

RULE: Mapping[str, Any] = {"metric": "chrf", "margin": 0.5}
GOOD = {"method": "direct", "learning_rate": 0.05, "epochs": 30, "batch_size": 8, "prefix_length": 4}
"""On random weights a prefix learns the one target that all lines have."""
BAD = {**GOOD, "learning_rate": 1e-9, "epochs": 1}


def lines(begin: int, count: int) -> list[Mapping[str, str]]:
    return [{"input": f"item {number}", "target": "Blue Spice"} for number in range(begin, begin + count)]


TRAIN, GATE = lines(0, 60), lines(1000, 60)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def start(world: TinyWorld, tmp_path: Path) -> Iterator[Start]:
    with trainers(tmp_path, world.folder) as start:
        yield start


def submit(trainer: TrainerProcess, how: Mapping[str, Any], seed: int, **body: Any) -> str:
    fields = {"promote_if": RULE, "defaults": {"num_beams": 1, "max_new_tokens": 8}, **body}
    if "gate_hold_out" not in fields:
        fields.setdefault("gate_dataset", trainer.upload(GATE))
    dataset = trainer.upload(body.pop("lines", TRAIN))
    fields.pop("lines", None)
    return trainer.submit("e2e", dataset, hyperparameters={**how, "seed": seed}, **fields)


def of_registry(tmp_path: Path) -> tuple[TaskInfo, list[AuditEntry]]:
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        return registry.inspect("default", "e2e"), registry.audit("default")


def test_a_good_version_gets_the_alias_and_a_bad_one_does_not(start: Start, tmp_path: Path) -> None:
    trainer = start()
    first = trainer.wait_for_job(submit(trainer, BAD, 1), "succeeded")
    assert first["result"]["gate"]["verdict"] == "promoted", "there was none to compare with"
    assert first["result"]["gate"]["current"] is None and first["result"]["alias"] == "production"

    good = trainer.wait_for_job(submit(trainer, GOOD, 2), "succeeded")
    gate = good["result"]["gate"]
    assert (gate["verdict"], gate["current"], gate["inputs"]) == ("promoted", first["version"], 60), gate
    assert gate["scores"]["new"] > gate["scores"]["current"]
    assert gate["rule"] == RULE and gate["scores"]["low"] >= -RULE["margin"]
    stages = [data.get("stage") for name, data in trainer.watch(good["id"]) if name == "state"]
    assert stages.index("gating") < stages.index("reporting") < stages.index("publishing")

    bad = trainer.wait_for_job(submit(trainer, BAD, 3), "succeeded")
    gate = bad["result"]["gate"]
    assert (gate["verdict"], gate["current"], bad["result"]["alias"]) == ("rejected", good["version"], None), gate
    assert gate["scores"]["low"] < -RULE["margin"]

    task, audit = of_registry(tmp_path)
    assert task.aliases == {"production": good["version"]}
    assert {info.version for info in task.versions} == {job["version"] for job in (first, good, bad)}
    for job in (first, good, bad):
        [info] = [info for info in task.versions if info.version == job["version"]]
        assert info.record["gate"] == job["result"]["gate"]
        with trainer.client() as client:
            report = client.get(f"/jobs/{job['id']}/report", params={"format": "json"}).json()
            page = client.get(f"/jobs/{job['id']}/report").text
        assert report["gate"] == job["result"]["gate"]
        assert job["result"]["gate"]["verdict"] in page
    assert [(entry.alias, entry.new, (entry.note or "").partition(":")[0]) for entry in audit] == [
        (None, bad["version"], "gate rejected"),
        ("production", good["version"], "gate promoted"),
        ("production", first["version"], "gate promoted"),
    ]


def test_inputs_that_either_version_has_seen_are_left_out_and_too_few_decide_nothing(
    start: Start, tmp_path: Path
) -> None:
    trainer = start()
    first = trainer.wait_for_job(submit(trainer, GOOD, 1, lines=[*TRAIN, *GATE[:5]]), "succeeded")
    kept = {"gate_dataset": trainer.upload([*GATE, *TRAIN[:7]])}
    judged = trainer.wait_for_job(submit(trainer, GOOD, 2, lines=TRAIN[:40], **kept), "succeeded")["result"]["gate"]
    assert judged["left_out"] == {"new": 7, "current": 5, "unknown": 0, "surplus": 0}, judged
    assert (judged["inputs"], judged["inputs_known"], judged["current"]) == (55, True, first["version"])
    task, _ = of_registry(tmp_path)
    few = trainer.wait_for_job(submit(trainer, GOOD, 3, lines=[*TRAIN, *GATE[5:20]]), "succeeded")["result"]
    assert (few["gate"]["verdict"], few["gate"]["inputs"], few["alias"]) == ("undecided", 40, None)
    assert "50 are needed" in few["gate"]["reason"]
    assert of_registry(tmp_path)[0].aliases == task.aliases


def test_a_share_held_out_is_the_same_inputs_for_a_later_version(start: Start, tmp_path: Path) -> None:
    trainer = start()
    share = {"gate_hold_out": 40}
    first = trainer.wait_for_job(submit(trainer, GOOD, 1, lines=lines(0, 200), promote_if=None, **share), "succeeded")
    assert "gate" not in first["result"]
    judged = trainer.wait_for_job(submit(trainer, GOOD, 2, lines=lines(0, 220), **share), "succeeded")["result"]["gate"]
    assert judged["inputs"] > 50 and judged["current"] == first["version"]
    assert judged["left_out"] == {"new": 0, "current": 0, "unknown": 0, "surplus": 0}


def test_an_alias_that_moves_during_the_job_is_compared_with_where_it_points_then(
    start: Start, world: TinyWorld, tmp_path: Path
) -> None:
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        registry.publish("default", "e2e", world.prefix(seed=1), record={})
        trainer = start()
        job = submit(trainer, {**BAD, "epochs": 30}, 2)
        trainer.wait_for_step(job, 1)
        moved = registry.publish("default", "e2e", world.prefix(seed=2), record={}).version
        done = trainer.wait_for_job(job, "succeeded")["result"]
        assert (done["gate"]["current"], done["gate"]["inputs_known"]) == (moved, False)
        task = registry.inspect("default", "e2e")
        assert task.aliases["production"] == (done["version"] if done["alias"] else moved)
        assert [entry.version for entry in task.history["production"]][:2][-1] == moved


@pytest.mark.slow
def test_a_worker_killed_in_the_gate_is_followed_by_one_that_judges_and_publishes_once(
    start: Start, tmp_path: Path
) -> None:
    trainer = start()
    trainer.wait_for_job(submit(trainer, BAD, 1), "succeeded")
    job = submit(trainer, GOOD, 2, gate_dataset=trainer.upload(lines(1000, 900)))
    wait_for(lambda: trainer.job(job)["stage"] == "gating", PATIENCE_S, lambda: str(trainer.job(job)))
    trainer.signal_all(signal.SIGKILL)
    trainer.wait()
    done = start().wait_for_job(job, "succeeded")
    task, audit = of_registry(tmp_path)
    assert task.aliases["production"] == done["version"] == done["result"]["version"]
    assert [entry.new for entry in audit].count(done["version"]) == 1
    [info] = [info for info in task.versions if info.version == done["version"]]
    assert json.loads(json.dumps(info.record["gate"])) == done["result"]["gate"]
