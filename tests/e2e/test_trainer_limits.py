"""What one job may take of a trainer: its only worker's time, and the machine's memory."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import TinyWorld, make_world
from tests.support.trainer_process import Start, restaurants, trainers

LONG = {"epochs": 10_000, "checkpoint_every": 5}
"""Hyperparameters of a job that runs for many minutes unless it is ended."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def start(world: TinyWorld, tmp_path: Path) -> Iterator[Start]:
    with trainers(tmp_path, world.folder) as start:
        yield start


def test_a_job_that_does_not_end_gives_the_only_worker_back_and_keeps_its_checkpoint(
    start: Start, tmp_path: Path
) -> None:
    trainer = start("--max-job-s", "40")
    dataset = trainer.upload(restaurants(40))
    endless = trainer.submit("endless", dataset, hyperparameters=LONG)
    waiting = trainer.submit("e2e", dataset)
    failure = trainer.wait_for_job(endless, "failed")["failure"]
    assert failure["code"] == "time_limit"
    assert "expected the job to end within 40 s" in failure["message"]
    assert list((tmp_path / "data").rglob(f"{endless}/*/checkpoint.safetensors"))
    assert trainer.wait_for_job(waiting, "succeeded")["result"]
    reached = trainer.job(endless)["progress"]["step"]
    trainer.post(f"/jobs/{endless}/retry").raise_for_status()
    trainer.wait_for_step(endless, reached + 1)  # from its checkpoint on, and with its time anew


def test_a_process_that_does_not_stop_in_time_is_killed_and_its_job_fails_for_its_time(start: Start) -> None:
    trainer = start("--max-job-s", "30")
    job = trainer.submit("e2e", trainer.upload(restaurants(40)), hyperparameters=LONG)
    trainer.wait_for_step(job, 1)
    trainer.signal_children(signal.SIGSTOP)
    assert trainer.wait_for_job(job, "failed")["failure"]["code"] == "time_limit"
    assert trainer.children() == []


def test_where_memory_runs_out_the_process_that_trains_dies_first_and_it_has_a_limit(start: Start) -> None:
    trainer = start("--max-job-memory", "8GiB")
    job = trainer.submit("e2e", trainer.upload(restaurants(40)), hyperparameters=LONG)
    trainer.wait_for_step(job, 1)
    [child] = trainer.children()

    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    assert score(child) == 1000 > score(trainer.process.pid)
    limit = re.search(r"^Max data size +(\d+) +(\d+) ", Path(f"/proc/{child}/limits").read_text(), re.M)
    assert limit is not None and set(limit.groups()) == {str(8 << 30)}


def test_a_job_that_needs_more_than_its_memory_fails_by_that_name_and_the_service_lives_on(start: Start) -> None:
    trainer = start("--max-job-memory", "1GiB")
    dataset = trainer.upload([{"input": f"{n} " + "word " * 60, "target": "word " * 60} for n in range(600)])
    large = {"middle": 65536, "prefix_length": 200, "batch_size": 512}
    job = trainer.submit("e2e", dataset, hyperparameters=large)
    assert trainer.wait_for_job(job, "failed")["failure"]["code"] == "out_of_memory"
    trainer.wait_for_job(trainer.submit("e2e", trainer.upload(restaurants(40))), "succeeded")
