"""A trainer whose disk becomes full: the job says so, nothing half-written is left, the service goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prefixes.files.folder import TEMPORARY
from tests.support.server import make_world
from tests.support.small_disk import on_a_small_disk
from tests.support.trainer_process import TrainerProcess, restaurants


def check(disk: Path, outside: Path) -> None:
    """Run in a namespace in which ``disk`` is small."""
    registry, backbone = str(outside / "registry"), f"tiny={outside / 'backbone'}"
    with TrainerProcess(outside, "--data", str(disk), "--registry", registry, "--backbone", backbone) as trainer:
        dataset = trainer.wait_ready().upload(restaurants(40))
        large = trainer.submit("large", dataset, hyperparameters={"middle": 8192})
        failure = trainer.wait_for_job(large, "failed")["failure"]
        assert failure["code"] == "disk_full", failure
        assert failure["message"] == "expected room on the disk for the run's files, got: No space left on device"
        assert list(disk.rglob(f"{TEMPORARY}*")) == []
        small = trainer.wait_for_job(trainer.submit("small", dataset), "succeeded")
        assert small["attempt"] == 1


@pytest.mark.slow
def test_a_job_that_fills_the_disk_says_so_and_the_next_one_is_trained(tmp_path: Path) -> None:
    make_world(tmp_path / "backbone")
    on_a_small_disk("tests.e2e.test_trainer_full_disk", tmp_path / "disk", tmp_path, size="2m")


if __name__ == "__main__":
    check(Path(sys.argv[1]), Path(sys.argv[2]))
