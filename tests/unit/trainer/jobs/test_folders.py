"""The fence around a job's folder: who was replaced finds nothing to write to."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from prefixes.errors import InvalidName
from prefixes.files import write_text
from trainer.jobs.errors import Fenced
from trainer.jobs.folders import JobFolders
from trainer.jobs.job import new_job
from trainer.jobs.record import Job


@pytest.fixture
def job() -> Job:
    return new_job("acme", "me", {}).job


def test_who_takes_over_gets_everything_and_who_was_replaced_cannot_write(tmp_path: Path, job: Job) -> None:
    folders = JobFolders(tmp_path)
    first = folders.enter(job)
    write_text(first / "checkpoint", "step 3")
    second = folders.enter(replace(job, token=2))
    assert (second / "checkpoint").read_text() == "step 3"
    with pytest.raises(FileNotFoundError):
        write_text(first / "checkpoint", "step 4")
    assert (second / "checkpoint").read_text() == "step 3"
    assert sorted(path.name for path in second.iterdir()) == ["checkpoint"]
    with pytest.raises(Fenced):
        folders.enter(job)
    assert folders.result(job) == second


def test_a_delivery_that_enters_twice_finds_its_own_folder(tmp_path: Path, job: Job) -> None:
    folders = JobFolders(tmp_path)
    write_text(folders.enter(job) / "checkpoint", "step 3")
    assert (folders.enter(job) / "checkpoint").read_text() == "step 3"


def test_a_delivery_that_never_entered_is_passed_over(tmp_path: Path, job: Job) -> None:
    folders = JobFolders(tmp_path)
    write_text(folders.enter(job) / "checkpoint", "step 3")
    assert (folders.enter(replace(job, token=7)) / "checkpoint").exists()


def test_of_many_who_enter_at_once_the_newest_has_the_folder(tmp_path: Path, job: Job) -> None:
    for round_ in range(20):
        one = replace(job, id=f"{job.id}-{round_}")
        folders = JobFolders(tmp_path)
        write_text(folders.enter(one) / "checkpoint", "step 3")
        barrier = threading.Barrier(6)

        def enter(token: int, one: Job = one, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                JobFolders(tmp_path).enter(replace(one, token=token))
            except Fenced:
                assert token < 7

        threads = [threading.Thread(target=enter, args=(token,)) for token in range(2, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        newest = folders.result(one)
        assert newest is not None
        assert newest.name == "run-7"
        assert (newest / "checkpoint").exists()


def test_a_removed_job_leaves_nothing_and_cannot_be_written_to(tmp_path: Path, job: Job) -> None:
    folders = JobFolders(tmp_path)
    folder = folders.enter(job)
    folders.remove(job)
    folders.remove(job)  # twice is once
    assert not folders.of(job).exists()
    assert list(folders.of(job).parent.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        write_text(folder / "checkpoint", "step 4")


@pytest.mark.parametrize("tenant", ["..", "a/b", "", "A", "a\0"])
def test_no_tenant_leads_out_of_the_folder(tmp_path: Path, job: Job, tenant: str) -> None:
    with pytest.raises(InvalidName):
        JobFolders(tmp_path).of(replace(job, tenant=tenant))
