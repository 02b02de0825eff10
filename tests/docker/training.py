"""What must hold of training by the composed service: from an upload to a served version, also when parts of it die.

As ``checks``: one function per promise. Each leaves the services whole.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tests.docker.load import MARKER, body
from tests.docker.stack import LEASE_S, TRAINERS, Stack, wait_for

LINES: Final = [
    {"input": f"name : {MARKER} {n} | Type : pub | area : riverside", "target": f"{MARKER} {n} is a riverside pub."}
    for n in range(80)
]
SETTINGS: Final = {"epochs": 14, "batch_size": 8, "checkpoint_every": 10, "learning_rate": 0.005, "seed": 7}
"""Of a run of 140 steps, long enough to be hit in its middle."""
JOB_S: Final = 300
MANY: Final = 10_000


@dataclass(frozen=True)
class Event:
    """One of a job's stream, ``at`` seconds after it was asked for."""

    name: str
    data: dict[str, Any]
    at: float


def a_dataset_becomes_a_served_version(stack: Stack) -> None:
    """Through the proxy alone: upload, job, events as they come, report; then every replica answers with it."""
    dataset = _upload(stack)
    job = _submit(stack, "pubs", dataset, evaluation={"limit": 3})
    told = list(_watch(stack, job))
    states = [event.data["state"] for event in told if event.name == "state"]
    assert states[0] == "queued" and states[-1] == "succeeded", told[-3:]
    steps = [event for event in told if event.name == "progress" and "loss" in event.data]
    assert len(steps) > 5 and steps[0].at < steps[-1].at - 1, "expected progress as it is made, not all at the end"
    assert steps[-1].data["loss"] < steps[0].data["loss"] / 2, (steps[0], steps[-1])
    done = _job(stack, job)
    assert {"bleu", "chrf"} <= set(done["result"]["scores"]), done
    status, headers, page = stack.request("GET", f"/jobs/{job}/report")
    assert status == 200 and headers["content-type"].startswith("text/html"), headers
    assert headers["content-security-policy"].startswith("default-src 'none'") and b"<script" not in page
    for _ in range(4):
        status, _, answer = stack.request("POST", "/generate", body("pubs", LINES[5]["input"]))
        assert status == 200 and json.loads(answer)["version"] == done["version"], (answer, done)
    assert json.loads(answer)["outputs"][0]["text"].startswith(MARKER), answer


def a_bad_line_of_a_long_upload_is_named(stack: Stack) -> None:
    """The trainer answers before the rest has come; the proxy passes it on."""
    good = json.dumps({"input": "x" * 200, "target": "y"})
    lines = [*[good] * 40_000, json.dumps({"input": "x"}), *[good] * 40_000]
    status, _, answer = stack.request("POST", "/datasets", "\n".join(lines).encode())
    error = json.loads(answer)["error"]
    assert status == 422 and error["code"] == "invalid_data" and error["detail"]["line"] == 40_001, (status, error)


def two_trainers_share_the_jobs(stack: Stack) -> None:
    """Two jobs at once run in two containers; each process that trains has no credentials. Cancels end both."""
    dataset = _upload(stack)
    jobs = [_submit(stack, f"shared-{n}", dataset, hyperparameters={**SETTINGS, "epochs": MANY}) for n in range(2)]
    try:
        wait_for("both trainers work", lambda: len(_working(stack)) == TRAINERS, 90)
        secret = "/run/prefixd/secrets/redis_trainer_password"
        password = stack.execute(stack.containers("trainer")[0], "cat", secret).strip()
        for container in stack.containers("trainer"):
            of_child = "cd $(dirname $(grep -al '[t]rainer.service.child' /proc/[0-9]*/cmdline)) && cat environ cmdline"
            said = stack.execute(container, "sh", "-c", of_child)
            assert "trainer.service.child" in said and "NUMBA_CACHE_DIR" in said, said
            assert password not in said and "PREFIXD_" not in said and "redis://" not in said, said
    finally:
        for job in jobs:
            assert stack.request("POST", f"/jobs/{job}/cancel")[0] == 200
    for job in jobs:
        assert _end(stack, job)["state"] == "cancelled"
    wait_for("nobody works", lambda: not _working(stack), 30)


def a_killed_trainer_loses_no_job(stack: Stack) -> None:
    """SIGKILL in the middle of a run: the other takes over, and ends in the same version as a run without."""
    undisturbed = {job["task"]: job for job in _jobs(stack)}["default/pubs"]
    job = _submit(stack, "killed", undisturbed["spec"]["dataset"])
    wait_for("its middle", lambda: _job(stack, job)["progress"].get("step", 0) > 40, JOB_S)
    (first,) = _working(stack)
    begun = time.monotonic()
    stack.kill(first)
    (other,) = stack.containers("trainer")
    wait_for("the other works on it", lambda: _working(stack) == [other], 10 * LEASE_S)
    took = time.monotonic() - begun
    assert stack.metric(other, "prefixd_trainer_job_step") > 30, "expected it to go on from the last checkpoint"
    done = _end(stack, job)
    assert (done["state"], done["attempt"]) == ("succeeded", 1), done
    assert done["version"] == undisturbed["version"], "expected the same prefix as without the kill"
    assert "worker lost" in stack.logs(other), stack.logs(other)[-2000:]
    stack.start(first)
    wait_for("both trainers again", lambda: stack.answering("prefixd-trainer") == TRAINERS)
    assert took < 5 * LEASE_S, f"expected the lease of {LEASE_S} s and a start to pass, got {took:.1f} s"


def a_stopped_trainer_hands_its_job_over(stack: Stack) -> None:
    """SIGTERM, as an upgrade does it: a checkpoint, exit code 0, and the other goes on without waiting for a lease."""
    job = _submit(stack, "stopped", _upload(stack), hyperparameters={**SETTINGS, "checkpoint_every": MANY})
    wait_for("its middle", lambda: _job(stack, job)["progress"].get("step", 0) > 40, JOB_S)
    (first,) = _working(stack)
    reached = _job(stack, job)["progress"]["step"]
    stack.stop(first)
    assert '"exit_code": 0' in stack.logs(first), stack.logs(first)[-2000:]
    assert "job handed back" in stack.logs(first)
    (other,) = stack.containers("trainer")
    wait_for("the other works on it", lambda: _working(stack) == [other], 60)
    assert stack.metric(other, "prefixd_trainer_job_step") >= reached, "expected nothing to be trained twice"
    assert _end(stack, job)["state"] == "succeeded"
    stack.start(first)
    wait_for("both trainers again", lambda: stack.answering("prefixd-trainer") == TRAINERS)


def a_killed_redis_stops_no_training(stack: Stack) -> None:
    """SIGKILL: the run goes on, uploads and jobs are refused meanwhile; then the job ends and is published."""
    dataset = _upload(stack)
    job = _submit(stack, "outlived", dataset)
    wait_for("a run", lambda: _job(stack, job)["progress"].get("step", 0) > 10, JOB_S)
    (redis,) = stack.containers("redis")
    stack.kill(redis)
    wait_for("refused", lambda: stack.request("GET", "/jobs")[0] == 503, 30)
    assert stack.request("POST", "/generate", body("e2e", "name : Blue Spice | Type : pub"))[0] in (200, 503)
    time.sleep(2 * LEASE_S)
    stack.start(redis)
    wait_for("jobs again", lambda: stack.request("GET", "/jobs")[0] == 200, 60)
    done = _end(stack, job)
    assert (done["state"], done["attempt"]) == ("succeeded", 1), done
    wait_for("it is served", lambda: stack.request("POST", "/generate", body("outlived", "x"))[0] == 200, 60)


def _upload(stack: Stack) -> str:
    content = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    status, _, answer = stack.request("POST", "/datasets?name=pubs", content)
    assert status == 201, answer
    dataset: str = json.loads(answer)["dataset"]
    return dataset


def _submit(stack: Stack, task: str, dataset: str, **fields: Any) -> str:
    request = {"task": task, "dataset": dataset, "hyperparameters": SETTINGS, "evaluation": None, **fields}
    status, _, answer = stack.request("POST", "/jobs", request)
    assert status == 201, answer
    job: str = json.loads(answer)["id"]
    return job


def _job(stack: Stack, job: str) -> dict[str, Any]:
    status, _, answer = stack.request("GET", f"/jobs/{job}")
    if status != 200:
        raise OSError(f"{status}: {answer[:200]!r}")
    found: dict[str, Any] = json.loads(answer)
    return found


def _jobs(stack: Stack) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = json.loads(stack.request("GET", "/jobs")[2])["jobs"]
    return [{**job, "task": job["spec"]["task"]} for job in jobs]


def _end(stack: Stack, job: str) -> dict[str, Any]:
    wait_for(f"the end of {job}", lambda: _job(stack, job)["finished_at"] is not None, JOB_S)
    return _job(stack, job)


def _watch(stack: Stack, job: str) -> Iterator[Event]:
    begun, name = time.monotonic(), ""
    watched = urllib.request.Request(f"{stack.url}/jobs/{job}/events", headers=stack.headers)
    with urllib.request.urlopen(watched, timeout=60) as stream:
        for line in stream:
            if line.startswith(b"event: "):
                name = line.removeprefix(b"event: ").decode().strip()
            elif line.startswith(b"data: "):
                yield Event(name, json.loads(line.removeprefix(b"data: ")), time.monotonic() - begun)


def _working(stack: Stack) -> list[str]:
    """The trainers whose worker has told of a step of its job."""
    return [name for name in stack.containers("trainer") if stack.metric(name, "prefixd_trainer_job_step") > 0]


TRAINING: Final[tuple[Callable[[Stack], None], ...]] = (
    a_dataset_becomes_a_served_version,
    a_bad_line_of_a_long_upload_is_named,
    two_trainers_share_the_jobs,
    a_killed_trainer_loses_no_job,
    a_stopped_trainer_hands_its_job_over,
    a_killed_redis_stops_no_training,
)
