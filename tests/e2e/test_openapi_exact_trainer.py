"""The trainer's OpenAPI documents are exactly true. A file of its own, for it takes as long as the server's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.openapi import NUMBERS, check
from tests.support.trainer_process import TrainerProcess, restaurants


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """A trainer that takes jobs and runs none, with a dataset."""
    folder = tmp_path_factory.mktemp("trainer")
    arguments = ("--data", str(folder / "data"), "--registry", str(folder / "registry"), "--workers", "0")
    with TrainerProcess(folder, *arguments, "--max-dataset-bytes", "1MiB", "--max-open-jobs", "20") as process:
        process.wait_ready()
        process.submit("e2e", process.upload(restaurants(8)))
        yield process


@pytest.mark.parametrize("cases", NUMBERS)
def test_the_trainers_documents_are_exact(trainer: TrainerProcess, cases: int) -> None:
    check(trainer, cases, waiting=True)
