"""A real ``prefixd trainer`` process, its children, and small helpers around its API. Knows no test."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.server import ServerProcess, events

PATIENCE_S = 90.0
"""For a job of some seconds on a busy machine."""
SMALL = {"prefix_length": 3, "middle": 8, "batch_size": 4, "epochs": 2, "checkpoint_every": 2, "seed": 3}
ENDED = ("succeeded", "failed", "cancelled")


class TrainerProcess(ServerProcess):
    """``prefixd trainer`` on free ports."""

    command = "trainer"

    def __init__(
        self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None, secret: str | None = None
    ) -> None:
        super().__init__(folder, "--progress-s", "0.05", "--threads", "1", *arguments, env=env, secret=secret)

    def wait_working(self, timeout_s: float = 120) -> None:
        """Return once it is ready, for one without the API."""
        wait_for(lambda: any(line["message"] == "ready" for line in self.log_lines()), timeout_s, self.log.read_text)

    def children(self) -> list[int]:
        """The process ids of those that train for it."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[1]) == self.process.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to the process and those that train for it, as when a machine stops or dies."""
        for pid in (self.process.pid, *self.children()):
            os.kill(pid, number)

    def signal_children(self, number: signal.Signals) -> None:
        """Send a signal to those that train for it."""
        for pid in self.children():
            os.kill(pid, number)

    def upload(self, lines: list[Mapping[str, str]]) -> str:
        """The id of a dataset with these lines."""
        content = "".join(json.dumps(line) + "\n" for line in lines)
        answer = self.post("/datasets", content=content.encode())
        assert answer.status_code == 201, answer.text
        dataset: str = answer.json()["dataset"]
        return dataset

    def submit(self, task: str, dataset: str, **body: Any) -> str:
        """The id of a job for a small run."""
        hyperparameters = {**SMALL, **body.pop("hyperparameters", {})}
        fields = {"task": task, "dataset": dataset, "hyperparameters": hyperparameters, "evaluation": None, **body}
        answer = self.post("/jobs", json=fields)
        assert answer.status_code == 201, answer.text
        job: str = answer.json()["id"]
        return job

    def post(self, path: str, **content: Any) -> httpx.Response:
        """``POST``."""
        with self.client() as client:
            return client.post(path, **content)

    def job(self, job_id: str) -> dict[str, Any]:
        """What the API says of a job."""
        with self.client() as client:
            body: dict[str, Any] = client.get(f"/jobs/{job_id}").raise_for_status().json()
        return body

    def wait_for_job(self, job_id: str, state: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The job once it is in ``state``; another end fails at once."""

        def reached() -> bool:
            found = self.job(job_id)
            assert found["state"] == state or found["state"] not in ENDED, found
            return bool(found["state"] == state)

        wait_for(reached, timeout_s, lambda: f"{self.job(job_id)} {self.log.read_text()[-3000:]}")
        return self.job(job_id)

    def wait_for_step(self, job_id: str, step: int, timeout_s: float = PATIENCE_S) -> None:
        """Return once the job has done so many steps."""
        wait_for(lambda: self.job(job_id)["progress"].get("step", 0) >= step, timeout_s, lambda: str(self.job(job_id)))

    def watch(self, job_id: str, after: str | None = None) -> Iterator[tuple[str, Any]]:
        """The job's events until it ends."""
        headers = {} if after is None else {"last-event-id": after}
        with self.client() as client, client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as stream:
            assert stream.status_code == 200
            yield from events(stream.iter_lines())


Start = Callable[..., TrainerProcess]


@contextmanager
def trainers(folder: Path, backbone: Path, *, ready: bool = True) -> Iterator[Start]:
    """Gives what starts trainers over one data folder and registry in ``folder``. They end with the block."""
    with ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> TrainerProcess:
            places = ("--data", str(folder / "data"), "--registry", str(folder / "registry"))
            made = stack.enter_context(
                TrainerProcess(folder, *places, "--backbone", f"tiny={backbone}", *arguments, **options)
            )
            return made.wait_ready() if ready else made

        yield start


def wait_for(reached: Callable[[], bool], timeout_s: float, why: Callable[[], str]) -> None:
    """Return once ``reached`` says so."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"not reached in {timeout_s} s: {why()}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs, whoever its parent is by now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def restaurants(count: int) -> list[Mapping[str, str]]:
    """Lines of a dataset, every input once."""
    numbers = [(n, n % 7) for n in range(count)]
    return [{"input": f"name : place {n} | food : {m}", "target": f"place {n} has food {m}"} for n, m in numbers]
