"""Several trainer processes on one Redis and one folder: killed, stopped, woken; no job is lost or published twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefixes.registry import open_registry
from prefixes.registry.base import AuditEntry
from tests.support.redis_server import RedisServer
from tests.support.server import PLAIN, TinyWorld, make_world
from tests.support.trainer_process import PATIENCE_S, TrainerProcess, restaurants, wait_for

pytestmark = pytest.mark.slow

LEASE_S = 4
STEPS = 300
RUN: dict[str, Any] = {"epochs": STEPS // 10, "checkpoint_every": 10, "validate_every": 1000, "middle": 2048}
"""Ten steps an epoch; some seconds in all."""


@dataclass
class Workplace:
    """One Redis, one folder, one registry, an API that does no work itself, and workers as a test wants them."""

    folder: Path
    redis: RedisServer
    world: TinyWorld
    api: TrainerProcess
    dataset: str
    stack: ExitStack

    def worker(self, *arguments: str) -> TrainerProcess:
        """One more worker, ready."""
        folder = self.folder / f"worker-{time.monotonic_ns()}"
        folder.mkdir()
        made = self.stack.enter_context(TrainerProcess(folder, *self.arguments(), "--no-api", *arguments))
        made.wait_working()
        return made

    def holder(self, job: str, *workers: TrainerProcess) -> tuple[TrainerProcess, TrainerProcess]:
        """Of two workers the one that has the job, which has done some steps, and the other."""
        self.api.wait_for_step(job, 40)
        one, other = workers
        return (one, other) if one.children() else (other, one)

    def arguments(self) -> tuple[str, ...]:
        return (
            "--data", str(self.folder / "data"), "--registry", str(self.folder / "registry"),
            "--redis", self.redis.url, "--backbone", f"tiny={self.world.folder}", "--lease-s", str(LEASE_S),
        )  # fmt: skip

    def submit(self, task: str, **body: Any) -> str:
        """A job of STEPS steps."""
        hyperparameters = {**RUN, **body.pop("hyperparameters", {})}
        return self.api.submit(task, self.dataset, hold_out=0, hyperparameters=hyperparameters, **body)

    def audit(self, task: str) -> list[AuditEntry]:
        """What happened to a task in the registry."""
        with closing(open_registry(str(self.folder / "registry"))) as registry:
            return [entry for entry in registry.audit("default", limit=1000) if entry.task == f"default/{task}"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder, world = tmp_path_factory.mktemp("workplace"), make_world(tmp_path_factory.mktemp("backbone"))
    with RedisServer(append_only=True) as redis, ExitStack() as stack:
        made = Workplace(folder, redis, world, None, "", stack)  # type: ignore[arg-type]
        made.api = stack.enter_context(TrainerProcess(folder, *made.arguments(), "--workers", "0")).wait_ready()
        made.dataset = made.api.upload(restaurants(40))
        yield made


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> str:
    """The version that comes of the jobs below when nothing happens to them."""
    worker = workplace.worker()
    job = workplace.api.wait_for_job(workplace.submit("undisturbed"), "succeeded")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    version: str = job["version"]
    return version


@pytest.fixture
def worker(workplace: Workplace) -> Iterator[Callable[..., TrainerProcess]]:
    """Workers that end with the test."""
    with ExitStack() as stack:
        before, workplace.stack = workplace.stack, stack
        yield workplace.worker
        workplace.stack = before


def test_a_killed_workers_job_is_taken_over_and_ends_with_the_same_prefix(
    workplace: Workplace, worker: Callable[..., TrainerProcess], undisturbed: str, record_property: Callable[..., None]
) -> None:
    workers, job = (worker(), worker()), workplace.submit("killed")
    first, second = workplace.holder(job, *workers)
    first.signal_all(signal.SIGKILL)
    killed_at = time.monotonic()
    reached = workplace.api.job(job)["progress"]["step"]
    wait_for(lambda: bool(second.children()), PATIENCE_S, lambda: str(workplace.api.job(job)))
    record_property("taken_over_after_s", time.monotonic() - killed_at)
    done = workplace.api.wait_for_job(job, "succeeded")
    assert done["version"] == undisturbed
    assert [entry.action for entry in workplace.audit("killed")] == ["publish"]
    told = list(workplace.api.watch(job))
    states = [data["state"] for name, data in told if name == "state"]
    assert list(dict.fromkeys(states)) == ["queued", "running", "succeeded"]
    assert states.count("queued") == 2
    assert first_step_after_take_over(told) > reached - 2 * RUN["checkpoint_every"], "it began again"


def test_a_stopped_worker_that_wakes_up_after_its_job_was_taken_over_writes_nothing(
    workplace: Workplace, worker: Callable[..., TrainerProcess], undisturbed: str
) -> None:
    workers, job = (worker(), worker()), workplace.submit("stopped")
    first, second = workplace.holder(job, *workers)
    stopped = first.children()
    first.signal_all(signal.SIGSTOP)
    wait_for(lambda: bool(second.children()), PATIENCE_S, lambda: str(workplace.api.job(job)))
    first.signal(signal.SIGCONT)  # now, while the other is at work
    for child in stopped:
        _continue(child)
    wait_for(lambda: not first.children(), PATIENCE_S, lambda: "the old process trains on")
    done = workplace.api.wait_for_job(job, "succeeded")
    assert done["version"] == undisturbed
    assert [entry.action for entry in workplace.audit("stopped")] == ["publish"]
    runs = {path.name for path in (workplace.folder / "data").glob(f"tenants/*/jobs/{job}/run-*")}
    assert runs == {"run-2"}
    assert any(line["message"] == "job lost to another worker" for line in first.log_lines())
    # It is none the worse for it: the next job may be its own.
    second.signal(signal.SIGTERM)
    second.wait()
    assert workplace.api.wait_for_job(workplace.submit("stopped-2"), "succeeded")["version"] == undisturbed


def test_a_worker_that_is_stopped_while_the_other_ends_its_job_does_not_publish_again(
    workplace: Workplace, worker: Callable[..., TrainerProcess], undisturbed: str
) -> None:
    workers, job = (worker(), worker()), workplace.submit("late")
    first, second = workplace.holder(job, *workers)
    stopped = first.children()
    first.signal_all(signal.SIGSTOP)
    assert workplace.api.wait_for_job(job, "succeeded")["version"] == undisturbed
    with closing(open_registry(str(workplace.folder / "registry"))) as registry:
        other = registry.publish("default", "late", workplace.world.prefix(), record={})  # moves the alias on
    first.signal(signal.SIGCONT)
    for child in stopped:
        _continue(child)
    wait_for(lambda: not first.children(), PATIENCE_S, lambda: "the old process trains on")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    with closing(open_registry(str(workplace.folder / "registry"))) as registry:
        assert registry.inspect("default", "late").aliases == {"production": other.version}
    assert [entry.action for entry in workplace.audit("late")] == ["publish", "publish"]
    assert second.process.poll() is None


def test_workers_share_the_jobs_and_each_runs_once(
    workplace: Workplace, worker: Callable[..., TrainerProcess], undisturbed: str
) -> None:
    worker()
    worker("--workers", "2")
    jobs = [workplace.submit(f"shared-{number}", hyperparameters={"epochs": 1}) for number in range(6)]
    for number, job in enumerate(jobs):
        workplace.api.wait_for_job(job, "succeeded")
        assert len(workplace.audit(f"shared-{number}")) == 1
        states = [data for name, data in workplace.api.watch(job) if name == "state" and data["state"] == "queued"]
        assert len(states) == 1


def test_a_cancel_reaches_a_worker_elsewhere_within_a_step(
    workplace: Workplace, worker: Callable[..., TrainerProcess]
) -> None:
    other = worker()
    job = workplace.submit("cancelled", hyperparameters={"epochs": 500, "middle": 4096, "batch_size": 32})
    workplace.api.wait_for_step(job, 3)
    workplace.api.post(f"/jobs/{job}/cancel")
    asked = workplace.api.job(job)["progress"]["step"]
    workplace.api.wait_for_job(job, "cancelled")
    assert other.children() == []
    assert workplace.api.job(job)["progress"]["step"] <= asked + 25  # of some thousands; steps take milliseconds here


def test_jobs_outlast_a_redis_that_is_away(
    workplace: Workplace, worker: Callable[..., TrainerProcess], undisturbed: str
) -> None:
    worker()
    job = workplace.submit("outlasting")
    workplace.api.wait_for_step(job, 5)
    workplace.redis.pause()
    try:
        answer = httpx.get(f"{workplace.api.url}/jobs/{job}", timeout=60, verify=PLAIN)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "jobs_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert httpx.get(f"{workplace.api.url}/ready", timeout=60, verify=PLAIN).status_code == 503
        assert httpx.get(f"{workplace.api.url}/health", timeout=60, verify=PLAIN).status_code == 200
        time.sleep(LEASE_S / 2)
    finally:
        workplace.redis.resume()
    done = workplace.api.wait_for_job(job, "succeeded")
    assert done["version"] == undisturbed


def test_a_redis_that_was_away_for_longer_than_a_lease_costs_no_worker_its_job(
    workplace: Workplace, worker: Callable[..., TrainerProcess]
) -> None:
    working = worker()
    job = workplace.submit("patient", hyperparameters={"epochs": 500})
    workplace.api.wait_for_step(job, 5)
    workplace.redis.kill()
    time.sleep(LEASE_S * 2)
    workplace.redis.start()
    wait_for(lambda: httpx.get(f"{workplace.api.url}/ready", verify=PLAIN).status_code == 200, PATIENCE_S, lambda: "")
    time.sleep(LEASE_S)  # in which those who look after the others would have found it lost
    assert workplace.api.post(f"/jobs/{job}/cancel").status_code == 200
    workplace.api.wait_for_job(job, "cancelled")
    told = [data["state"] for name, data in workplace.api.watch(job) if name == "state"]
    assert told.count("queued") == 1
    assert not any(line["message"] == "job lost to another worker" for line in working.log_lines())


def test_a_worker_that_shuts_down_hands_its_job_to_another_at_once(
    workplace: Workplace, worker: Callable[..., TrainerProcess], undisturbed: str
) -> None:
    workers = (worker(), worker())
    job = workplace.submit("handed-over", hyperparameters={"checkpoint_every": 100_000})
    first, _ = workplace.holder(job, *workers)
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    reached = workplace.api.job(job)["progress"].get("step", 0)
    workplace.api.wait_for_job(job, "succeeded")
    assert first_step_after_take_over(list(workplace.api.watch(job))) > reached


def first_step_after_take_over(told: list[tuple[str, Any]]) -> int:
    """What the second worker of a job did first."""
    queued = [index for index, (name, data) in enumerate(told) if name == "state" and data["state"] == "queued"]
    assert len(queued) == 2
    steps = [data["step"] for name, data in told[queued[1] :] if name == "progress" and "step" in data]
    return int(steps[0])


def _continue(pid: int) -> None:
    import contextlib
    import os

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
