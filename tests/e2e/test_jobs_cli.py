"""``prefixd jobs`` and ``prefixd datasets`` against a real trainer."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import prefixd
from tests.support.paths import ROOT
from tests.support.server import TinyWorld, free_port, make_world
from tests.support.trainer_process import PATIENCE_S, SMALL, TrainerProcess, restaurants, wait_for

OPTIONS = ((f"--{name.replace('_', '-')}", str(value)) for name, value in SMALL.items())
FAST = ["--backbone", "tiny", *(word for option in OPTIONS for word in option)]
LONG = [*FAST, "--no-evaluate", "--epochs", "500"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("backbone"))


def started(world: TinyWorld, folder: Path, *arguments: str) -> TrainerProcess:
    places = ("--data", str(folder / "data"), "--registry", str(folder / "registry"))
    return TrainerProcess(folder, *places, "--backbone", f"tiny={world.folder}", *arguments)


@pytest.fixture(scope="module")
def trainer(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    with started(world, tmp_path_factory.mktemp("trainer")) as made:
        yield made.wait_ready()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uploads") / "Restaurants.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in restaurants(40)))
    return path


def prefixd_of(trainer: TrainerProcess, *arguments: str, typed: str | None = None) -> Result:
    """A command in this process."""
    return CliRunner().invoke(prefixd.app, arguments, input=typed, env={"PREFIXD_TRAINER": trainer.url})


def jobs(trainer: TrainerProcess, *arguments: str, code: int = 0) -> Result:
    result = prefixd_of(trainer, "jobs", *arguments)
    assert result.exit_code == code, result.output
    return result


def submitted(trainer: TrainerProcess, data: Path, *options: str) -> str:
    """The id of a job."""
    return jobs(trainer, "submit", "--task", "e2e", "--data", str(data), *options).stdout.strip()


class Watching:
    """``prefixd jobs watch`` as a process of its own."""

    def __init__(self, folder: Path, trainer: TrainerProcess, *arguments: str) -> None:
        self.out, self.err = folder / "watch.out", folder / "watch.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefixd", "jobs", "watch", "--trainer", trainer.url, *arguments],
                cwd=ROOT, stdout=out, stderr=err,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
            )  # fmt: skip

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for(self, text: str) -> None:
        """Return once it has said so."""

        def said() -> bool:
            return text in self.out.read_text() + self.err.read_text()

        wait_for(lambda: said() or self.process.poll() is not None, PATIENCE_S, self.err.read_text)
        assert said(), self.err.read_text()


@pytest.fixture(scope="module")
def finished(trainer: TrainerProcess, data: Path) -> tuple[str, str]:
    """A job that was watched to its success, and what the watch told."""
    result = jobs(trainer, "submit", "--task", "acme-e2e", "--data", str(data), "--watch", "--hold-out", "50",
                  "--alias", "candidate", "--limit", "3", *FAST)  # fmt: skip
    assert re.fullmatch(r"job-\S+\n", result.stdout), "stdout is for scripts"
    return result.stdout.strip(), result.stderr


def test_a_job_is_submitted_and_watched_to_its_end(trainer: TrainerProcess, finished: tuple[str, str]) -> None:
    job, told = finished
    lines = told.splitlines()
    stages = [line for line in lines if re.match(r"queued|running|succeeded", line)]
    running = [f"running: {stage}" for stage in ("loading", "training", "evaluating", "reporting", "publishing")]
    assert stages == ["queued", *running, "succeeded"]
    assert any(re.match(r"step (\d+)/\1  .*loss \d+\.\d+  validation loss \d", line) for line in lines), told
    version = trainer.job(job)["version"]
    assert f"default/acme-e2e@{version[:19]}" in told
    assert "default/acme-e2e@candidate is this version now" in told
    assert "  bleu " in told


def test_a_job_that_has_ended_can_be_watched_again(trainer: TrainerProcess, finished: tuple[str, str]) -> None:
    job, told = finished
    again = jobs(trainer, "watch", job)
    assert told.splitlines()[-1] == again.stderr.splitlines()[-1]
    events = [json.loads(line) for line in jobs(trainer, "watch", job, "--json").stdout.splitlines()]
    assert all(set(event) == {"id", "event", "data"} for event in events)
    assert {event["event"] for event in events} == {"state", "progress"}
    assert events[-1]["data"]["result"] == trainer.job(job)["result"]


def test_jobs_are_listed_and_shown(trainer: TrainerProcess, finished: tuple[str, str]) -> None:
    job, _ = finished
    listed = jobs(trainer, "list", "--limit", "500").stdout
    assert re.search(rf"{job} +default/acme-e2e +succeeded .*sha256:", listed)
    found = json.loads(jobs(trainer, "list", "--state", "succeeded", "--json").stdout)["jobs"]
    assert [item["id"] for item in found] == [job]
    assert jobs(trainer, "list", "--state", "done", code=1).stderr.startswith("error (invalid_parameter): --state")
    shown = jobs(trainer, "show", job).stdout
    for part in (job, "succeeded", "default/acme-e2e", "candidate", "prefix_length 3", "bleu", "tiny"):
        assert part in shown, part
    assert json.loads(jobs(trainer, "show", job, "--json").stdout) == trainer.job(job)


def test_a_report_goes_to_a_file_and_overwrites_none(
    trainer: TrainerProcess, finished: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = finished
    monkeypatch.chdir(tmp_path)
    assert jobs(trainer, "report", job).stdout == f"report-{job}.html\n"
    page = (tmp_path / f"report-{job}.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "acme-e2e" in page
    output = tmp_path / "kept"
    output.write_text("mine")
    refused = jobs(trainer, "report", job, "--output", str(output), code=1)
    assert "--force" in refused.stderr and output.read_text() == "mine"
    jobs(trainer, "report", job, "--output", str(output), "--force")
    assert output.read_text() == page
    assert json.loads(jobs(trainer, "report", job, "--json").stdout)["evaluation"]["scores"]["bleu"]
    missing = jobs(trainer, "report", job, "--output", str(tmp_path / "no" / "report"), code=1)
    assert missing.stderr.startswith("error (invalid_parameter)") and "Traceback" not in missing.stderr


def test_a_known_dataset_is_not_sent_again(trainer: TrainerProcess, data: Path, finished: tuple[str, str]) -> None:
    again = prefixd_of(trainer, "datasets", "upload", str(data))
    assert "the trainer has it (40 lines)" in again.stderr
    dataset = again.stdout.strip()
    assert dataset == trainer.job(finished[0])["spec"]["dataset"]
    assert "sent 40 lines" in finished[1]
    [listed] = json.loads(prefixd_of(trainer, "datasets", "list", "--json").stdout)["datasets"]
    assert (listed["dataset"], listed["name"], listed["lines"]) == (dataset, "restaurants", 40)


def test_ctrl_c_leaves_a_job_running_and_cancel_ends_it(trainer: TrainerProcess, data: Path, tmp_path: Path) -> None:
    job = submitted(trainer, data, *LONG)
    queued = submitted(trainer, data, *LONG)
    with Watching(tmp_path, trainer, job) as watching:
        watching.wait_for("step ")
        watching.process.send_signal(signal.SIGINT)
        assert watching.process.wait(PATIENCE_S) == 130
        assert f"prefixd jobs cancel {job}" in watching.err.read_text()
        assert "Traceback" not in watching.err.read_text()
    assert trainer.job(job)["state"] == "running"
    busy = prefixd_of(trainer, "datasets", "delete", trainer.job(job)["spec"]["dataset"])
    assert (busy.exit_code, busy.stderr[:17]) == (1, "error (conflict):")
    assert jobs(trainer, "delete", job, "--yes", code=1).stderr.startswith("error (conflict): delete")

    assert jobs(trainer, "cancel", queued).stderr == f"{queued}: cancelled\n"
    assert jobs(trainer, "retry", queued).stderr == f"{queued}: queued, attempt 2\n"
    assert jobs(trainer, "cancel", queued, "--wait").stderr == f"{queued}: cancelled\n"
    assert jobs(trainer, "cancel", job, "--wait").stderr == f"{job}: cancelled\n"
    assert trainer.job(job)["state"] == "cancelled"
    assert jobs(trainer, "watch", job, code=3).stderr.splitlines()[-1] == "cancelled"
    no = prefixd_of(trainer, "jobs", "delete", job, typed="n\n")
    assert no.exit_code != 0 and trainer.job(job)["state"] == "cancelled"
    assert prefixd_of(trainer, "jobs", "delete", job, typed="y\n").exit_code == 0
    assert jobs(trainer, "show", job, code=1).stderr.startswith("error (job_not_found): ")


def test_a_job_that_fails_says_why(trainer: TrainerProcess, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [*restaurants(10), {"input": "x " * 20_000, "target": "too long"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--task", "e2e", "--data", str(path), "--hold-out", "0", "--watch", "--no-evaluate", *FAST)
    told = jobs(trainer, "submit", *options, code=1).stderr.splitlines()
    assert told[-2] == "failed"
    assert told[-1].startswith("error (invalid_data): ") and "line 11" in told[-1]
    [failed] = json.loads(jobs(trainer, "list", "--state", "failed", "--json").stdout)["jobs"]
    assert "invalid_data" in jobs(trainer, "list", "--state", "failed").stdout
    assert prefixd_of(trainer, "datasets", "delete", failed["spec"]["dataset"]).exit_code == 0
    again = jobs(trainer, "retry", failed["id"], "--watch", code=1).stderr
    assert again.splitlines()[-1].startswith("error (dataset_not_found): "), "a retry without its data"


@pytest.mark.parametrize("action", ["watch", "show", "cancel", "retry", "delete", "report"])
def test_an_unknown_job_is_named_in_one_line(trainer: TrainerProcess, action: str) -> None:
    for job, code in (("job-000000000000-0000000000000000", "job_not_found"), ("../datasets", "invalid_name")):
        result = jobs(trainer, action, job, code=1)
        assert re.fullmatch(rf"error \({code}\): .*\n", result.stderr), result.stderr
        assert result.stdout == ""


def test_a_trainer_that_is_not_there_is_named_in_one_line(data: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for arguments in (("jobs", "list"), ("jobs", "watch", "job-1"), ("datasets", "upload", str(data))):
        result = CliRunner().invoke(prefixd.app, [*arguments, "--trainer", url])
        assert result.exit_code == 1
        assert re.fullmatch(rf"error \(trainer_unavailable\): cannot reach the trainer at {url}: .*\n", result.stderr)
    result = CliRunner().invoke(prefixd.app, ["jobs", "list", "--trainer", "localhost:8100"])
    assert "expected http://host[:port]" in result.stderr


def test_what_the_trainer_refuses_is_told_in_its_words(trainer: TrainerProcess, data: Path) -> None:
    for options, says in (
        (["--backbone", "gpt5"], "error (invalid_parameter): backbone: expected one of tiny"),
        (["--epochs", "0"], "error (invalid_request): hyperparameters.epochs"),
        (["--method", "best"], "error (invalid_request): hyperparameters.method"),
        (["--start-from", "nothing"], "error (task_not_found)"),
    ):  # fmt: skip
        result = jobs(trainer, "submit", "--task", "e2e", "--data", str(data), *options, code=1)
        assert result.stderr.splitlines()[-1].startswith(says), result.stderr
        assert result.stdout == ""


def test_a_watch_outlives_a_trainer_that_is_killed_and_started_again(
    world: TinyWorld, data: Path, tmp_path: Path
) -> None:
    with started(world, tmp_path) as first:
        first.wait_ready()
        job = submitted(first, data, *FAST, "--no-evaluate", "--epochs", "15", "--checkpoint-every", "5")
        with Watching(tmp_path, first, job, "--json") as watching:
            first.wait_for_step(job, 10)
            watching.wait_for('"progress"')
            first.signal(signal.SIGKILL)
            first.wait()
            watching.wait_for("connection lost, trying again: ")
            with started(world, tmp_path, "--port", str(first.port)) as again:
                again.url = first.url
                assert watching.process.wait(PATIENCE_S) == 0, watching.err.read_text()
                assert "connected again" in watching.err.read_text()
                events = [json.loads(line) for line in watching.out.read_text().splitlines()]
                assert events == [
                    {"id": str(number), "event": name, "data": data}
                    for number, (name, data) in enumerate(again.watch(job), 1)
                ], "every event once, in order"  # fmt: skip
    states = [event["data"]["state"] for event in events if event["event"] == "state"]
    assert list(dict.fromkeys(states)) == ["queued", "running", "succeeded"]
    assert states.count("queued") == 2
