"""What a job's process makes of its folder, when another process has begun the run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.errors import BackboneError, PrefixdError
from prefixes.files import write_json
from tests.support.prefixes import save_tiny_gpt2
from tests.support.trainer import TEMPLATE, toy_pairs, write_jsonl
from trainer.data.errors import TrainingStopped
from trainer.service.child import Pace
from trainer.service.request import REQUEST
from trainer.service.run_job import read_request, run_job
from trainer.training import budget
from trainer.training.checkpoint import CheckpointError
from trainer.training.config import TrainConfig


@dataclass
class Listening:
    """A listener that says stop after so many steps."""

    stop_after: int = 10_000
    steps: list[int] = field(default_factory=list)

    def tell(self, event: str, **facts: Any) -> None:
        if "step" in facts:
            self.steps.append(facts["step"])

    def should_stop(self) -> bool:
        return bool(self.steps) and self.steps[-1] >= self.stop_after


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_gpt2(tmp_path / "backbone")
    data = write_jsonl(tmp_path / "data.jsonl", toy_pairs(20))
    named = data.rename(tmp_path / f"{digest(data)}.jsonl")
    config = TrainConfig(prefix_length=3, method="direct", epochs=4, batch_size=4, validate_every=1)
    run = {
        "data": str(named), "validation": None, "backbone": str(tmp_path / "backbone"), "device": "cpu",
        "dtype": "float32", "config": config.as_dict(), "template": TEMPLATE, "hold_out": 20, "defaults": {},
        "drop_long": False, "truncate": False,
    }  # fmt: skip
    made = tmp_path / "run-1"
    made.mkdir()
    write_json(
        made / REQUEST,
        {"task": "default/toy", "evaluation": {"preset": "plain", "metrics": (), "limit": 2}, "threads": 1,
         "start_text": None, "run": run},
    )  # fmt: skip
    return made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_goes_on_as_it_began_on_a_machine_that_would_begin_it_otherwise(folder: Path) -> None:
    """A job that a machine with a GPU had begun failed on every other: autocast was True and is False."""
    first = Listening(stop_after=5)
    request = json.loads((folder / REQUEST).read_text())
    request["run"]["autocast"] = True  # as a GPU chooses it
    write_json(folder / REQUEST, request)
    with pytest.raises(TrainingStopped):
        run_job(folder, first, Pace())
    del request["run"]["autocast"]
    write_json(folder / REQUEST, request)
    assert read_request(folder).run.autocast
    second = Listening()
    run_job(folder, second, Pace())
    assert second.steps[0] > 5
    report = json.loads((folder / "report.json").read_text())
    assert report["cost"]["tokens"] == report["tokens"] > 0
    assert {"seconds", "tokens_per_second", "peak_memory_bytes"} <= report["cost"].keys()


def test_options_that_cannot_be_read_are_a_named_error(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="run's options"):
        read_request(folder)


def test_a_backbone_that_a_server_refuses_is_trained_and_scored_only_where_the_trainer_is_told_so(folder: Path) -> None:
    path = folder.parent / "backbone" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sequence_bias": [[[5], 2.0]]}))
    with pytest.raises(BackboneError, match="--ignore-generation-config sequence_bias"):
        run_job(folder, Listening(), Pace())
    request = json.loads((folder / REQUEST).read_text())
    request["run"]["ignore_generation_config"] = ["sequence_bias"]
    write_json(folder / REQUEST, request)
    run_job(folder, Listening(), Pace())
    assert (folder / "evaluation.json").exists()


def test_scoring_takes_no_more_threads_than_its_job_may(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    from server.engine import kernels
    from trainer.evaluation import generate

    chosen = kernels.select_kernels

    def select(device: torch.device, dtype: torch.dtype, *, threads: int | None = None, **given: Any) -> Any:
        asked.append(threads)
        return chosen(device, dtype, threads=threads, **given)

    monkeypatch.setattr(generate, "select_kernels", select)
    run_job(folder, Listening(), Pace())
    assert asked == [1]


def test_a_validation_loss_that_is_not_finite_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It made a report that was no JSON."""
    from trainer.training import loop

    monkeypatch.setattr(loop, "token_loss", lambda *_: float("nan"))
    with pytest.raises(PrefixdError, match="finite validation loss") as caught:
        run_job(folder, Listening(), Pace())
    assert caught.value.code == "training_diverged"


def test_a_search_is_told_with_its_trials_and_goes_on_from_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps end it, long before its minutes."""
    monkeypatch.setattr(budget, "STEPS_PER_MINUTE", 1)
    request = json.loads((folder / REQUEST).read_text())
    request["run"] |= {"auto": {"budget_minutes": 60, "fixed": ["init", "learning_rate", "prefix_length"]}}
    write_json(folder / REQUEST, request)
    trials: list[str] = []

    class Told(Listening):
        def tell(self, event: str, **facts: Any) -> None:
            super().tell(event, **facts)
            trials.extend(facts[name] for name in facts if name == "trial")

    with pytest.raises(TrainingStopped):
        run_job(folder, Told(stop_after=12), Pace())
    assert not (folder / "report.json").exists()
    run_job(folder, Told(), Pace())
    assert set(trials) == {"round 1 of 1, trial 1 of 1: length 3, random, direct, rate 8e-05"}
    record = json.loads((folder / "record.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    assert record["search"] == report["search"]
    (trial,) = record["search"]["trials"]
    assert 12 < trial["made"] <= 60
    assert "Search" in (folder / "report.html").read_text()


def test_held_out_inputs_that_are_training_inputs_are_warned_of(folder: Path) -> None:
    request = json.loads((folder / REQUEST).read_text())
    request["run"] |= {"validation": request["run"]["data"]}
    write_json(folder / REQUEST, request)
    run_job(folder, Listening(), Pace())
    (warning,) = json.loads((folder / "record.json").read_text())["warnings"]
    assert "20 of the 20 held-out inputs are training inputs too" in warning
    assert warning in (folder / "report.html").read_text()
