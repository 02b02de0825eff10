"""The trainer as a service: real processes over HTTP, from an upload to a served version."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefixes.artifact import read_prefix
from prefixes.registry import open_registry
from prefixes.usage.model import Counts
from tests.support.redis_server import RedisServer
from tests.support.server import PLAIN, ServerProcess, TinyWorld, make_world
from tests.support.traffic import SHORT, Requests
from tests.support.trainer_process import PATIENCE_S, Start, TrainerProcess, alive, restaurants, trainers, wait_for

LONG = {"epochs": 500, "checkpoint_every": 5}
"""Hyperparameters of a job that runs for minutes unless it is ended."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def start(world: TinyWorld, tmp_path: Path) -> Iterator[Start]:
    with trainers(tmp_path, world.folder, ready=False) as start:
        yield start


@pytest.fixture(scope="module")
def idle(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """A service whose jobs wait for ever."""
    folder = tmp_path_factory.mktemp("idle")
    places = ("--data", str(folder / "data"), "--registry", str(folder / "registry"))
    with TrainerProcess(folder, *places, "--backbone", f"tiny={world.folder}", "--workers", "0") as made:
        yield made.wait_ready()


def test_data_becomes_a_version_that_a_server_under_load_serves(world: TinyWorld, start: Start, tmp_path: Path) -> None:
    trainer = start().wait_ready()
    with ServerProcess(
        tmp_path, "--backbone", str(world.folder), "--registry", str(tmp_path / "registry"), "--device", "cpu"
    ) as server:
        server.wait_ready()
        with server.client() as client:
            client.post(
                "/prefixes", data={"task": "busy"}, files={"file": ("p", world.prefix())}
            ).raise_for_status()
            said = client.post("/generate", json={"task": "busy", "input": "Blue", "parameters": SHORT}).json()
        with Requests(server, "busy", (said["version"], said["outputs"][0]["text"])) as load:
            dataset = trainer.upload(restaurants(60))
            job = trainer.submit("acme-e2e", dataset, evaluation={"preset": "plain", "limit": 3})
            told = list(trainer.watch(job))
            load.wait_for(3, PATIENCE_S)
            with server.client() as client:
                answer = client.post("/generate", json={"task": "acme-e2e", "input": "name : place 1"})
        assert load.faults == []
    assert answer.status_code == 200, answer.text
    done = trainer.job(job)
    assert done["state"] == "succeeded", done
    assert answer.json()["version"] == done["result"]["version"] == done["version"]
    states = [data["state"] for name, data in told if name == "state"]
    assert states[0] == "queued" and states[-1] == "succeeded"
    stages = [data.get("stage") for name, data in told if name == "state" and data["state"] == "running"]
    assert list(dict.fromkeys(stages)) == ["loading", "training", "evaluating", "reporting", "publishing"]
    progress = [data for name, data in told if name == "progress" and "loss" in data]
    assert progress[-1]["step"] == progress[-1]["total"]
    assert {"loss", "validation_loss", "tokens_per_s", "seconds_left"} <= set(progress[-1])
    assert {"bleu", "chrf", "validation_loss_per_token"} <= set(done["result"]["scores"])
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        [version] = registry.inspect("default", "acme-e2e").versions
        assert version.record["job"] == job
        assert version.record["scores"] == done["result"]["scores"]
        assert "evaluation" in version.record


def test_a_report_is_a_page_that_asks_for_nothing_else(start: Start) -> None:
    trainer = start().wait_ready()
    lines = [*restaurants(40), {"input": "</style><script>alert(1)</script>", "target": "<img src=x onerror=alert(1)>"}]
    job = trainer.submit("e2e", trainer.upload(lines), hold_out=50, evaluation={"preset": "plain", "limit": None})
    with trainer.client() as client:
        early = client.get(f"/jobs/{job}/report")
        assert early.status_code == 409
        trainer.wait_for_job(job, "succeeded")
        page = client.get(f"/jobs/{job}/report")
        data = client.get(f"/jobs/{job}/report", params={"format": "json"})
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "<script" not in page.text
    assert "<img" not in page.text
    assert data.json()["evaluation"]["scores"]["bleu"]
    assert str(Path.home()) not in data.text


def test_a_bad_line_is_named_and_nothing_is_kept(start: Start, tmp_path: Path) -> None:
    trainer = start().wait_ready()
    lines = [json.dumps(line) for line in restaurants(50)]
    lines[36] = json.dumps({"input": "name : x", "target": 7})
    answer = trainer.post("/datasets", content="\n".join(lines).encode())
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "invalid_data"
    assert error["detail"]["line"] == 37
    assert error["detail"]["field"] == "target"
    assert "line 37" in error["message"]
    assert list((tmp_path / "data").rglob("*.jsonl")) == []
    assert httpx.get(f"{trainer.url}/datasets", verify=PLAIN).json() == {"datasets": []}


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ({"task": "a/b/c"}, "invalid_name", "tenant"),
        ({"backbone": "gpt5"}, "invalid_parameter", "tiny"),
        ({"backbone": "/etc"}, "invalid_parameter", "tiny"),
        ({"dataset": "sha256:" + "0" * 64}, "dataset_not_found", "dataset"),
        ({"dataset": "../../etc/passwd"}, "invalid_request", "dataset"),
        ({"hyperparameters": {"epoch": 3}}, "invalid_request", "did you mean epochs"),
        ({"hyperparameters": {"epochs": 0}}, "invalid_request", "epochs"),
        ({"hyperparameters": {"method": "mlp", "frozen_positions": 2}}, "invalid_parameter", "frozen_positions"),
        ({"preset": "webnlq"}, "invalid_parameter", "webnlg"),
        ({"template": "no field"}, "invalid_artifact", "input"),
        ({"evaluation": {"preset": "best"}}, "invalid_parameter", "plain"),
        ({"alias": "so long " * 20}, "invalid_request", "alias"),
        ({"start_from": "nothing"}, "task_not_found", "nothing"),
        ({"defaults": {"num_beams": "five"}}, "invalid_parameter", "num_beams"),
        ({"tasks": "e2e"}, "invalid_request", "did you mean task"),
        ({"defaults": {"stop": ["x" * 20_000]}}, "invalid_request", "10000"),
        ({"start_from": "e2e", "hyperparameters": {"init": "some words"}}, "invalid_parameter", "both"),
        ({"start_text": "a", "hyperparameters": {"init": "some words"}}, "invalid_parameter", "both"),
    ],
)
def test_a_job_that_cannot_be_trained_is_refused_at_once(idle: TrainerProcess, body: Any, code: str, says: str) -> None:
    dataset = idle.upload(restaurants(10))
    answer = idle.post("/jobs", json={"task": "e2e", "dataset": dataset, **body})
    assert answer.json()["error"]["code"] == code, answer.text
    assert says in answer.json()["error"]["message"]
    assert httpx.get(f"{idle.url}/jobs", verify=PLAIN).json()["jobs"] == []


def test_a_version_of_another_tenants_is_nothing_to_start_from(start: Start, world: TinyWorld, tmp_path: Path) -> None:
    trainer = start("--workers", "0").wait_ready()
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        theirs = registry.publish("acme", "theirs", world.prefix(seed=2), record={}).version
        registry.publish("default", "mine", world.prefix(), record={})
    told = []
    for version in (theirs, f"sha256:{'0' * 64}"):
        body = {"task": "e2e", "dataset": trainer.upload(restaurants(10)), "start_from": f"mine@{version}"}
        answer = trainer.post("/jobs", json=body)
        error = answer.json()["error"]
        told.append((answer.status_code, error["code"], error["message"].replace(version, "?")))
    assert told[0] == told[1]
    assert told[0][:2] == (404, "task_not_found")


def test_half_a_character_is_refused_and_spoils_no_list(idle: TrainerProcess) -> None:
    body = {"task": "e2e", "dataset": idle.upload(restaurants(10)), "defaults": {"stop": ["\ud800"]}}
    answer = idle.post("/jobs", content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert httpx.get(f"{idle.url}/jobs", verify=PLAIN).json()["jobs"] == []


def test_a_run_that_diverges_fails_by_its_name_and_spoils_no_list(start: Start) -> None:
    trainer = start().wait_ready()
    wild = {"learning_rate": 10, "weight_decay": 10, "method": "direct", "validate_every": 1, "epochs": 20}
    job = trainer.submit("e2e", trainer.upload(restaurants(40)), hyperparameters=wild)
    failed = trainer.wait_for_job(job, "failed")
    assert failed["failure"]["code"] == "training_diverged"
    assert failed["progress"]["step"] > 1
    assert [name for name, _ in trainer.watch(job)].count("progress") > 0
    assert len(httpx.get(f"{trainer.url}/jobs", verify=PLAIN).json()["jobs"]) == 1


def test_a_running_job_stops_within_a_step_of_its_cancel_and_goes_on_with_a_retry(
    start: Start, tmp_path: Path
) -> None:
    trainer = start().wait_ready()
    job = trainer.submit("e2e", trainer.upload(restaurants(40)), hyperparameters=LONG)
    trainer.wait_for_step(job, 10)
    assert trainer.post(f"/jobs/{job}/cancel").status_code == 200
    cancelled = trainer.wait_for_job(job, "cancelled")
    assert trainer.children() == []
    assert cancelled["progress"]["step"] < cancelled["progress"]["total"]
    assert trainer.post(f"/jobs/{job}/cancel").json()["state"] == "cancelled"  # asked twice
    assert trainer.post(f"/jobs/{job}/retry").json()["state"] == "queued"
    trainer.wait_for_step(job, cancelled["progress"]["step"] + 1)
    with trainer.client() as client:
        assert client.delete(f"/jobs/{job}").status_code == 409
        client.post(f"/jobs/{job}/cancel")
        trainer.wait_for_job(job, "cancelled")
        last = trainer.job(job)["progress"]
        assert client.delete(f"/jobs/{job}").status_code == 204
        assert client.get(f"/jobs/{job}").status_code == 404
    with closing(open_registry(str(tmp_path / "registry"))) as registry:  # what it took stays, and counts once
        rows = [row for row in registry.usage.read("0001-01-01", "9999-12-31") if row.subject.kind == "training"]
    took = sum((row.counts for row in rows), Counts())
    assert (took.jobs, took.training_steps, took.training_tokens) == (2, last["step"], last["tokens"])
    assert took.training_ms > 0 and {(row.subject.task, row.subject.outcome) for row in rows} == {
        ("default/e2e", "aborted")
    }  # fmt: skip


def test_a_process_that_does_not_hear_of_its_cancel_is_killed(start: Start) -> None:
    trainer = start().wait_ready()
    job = trainer.submit("e2e", trainer.upload(restaurants(40)), hyperparameters=LONG)
    trainer.wait_for_step(job, 1)
    [child] = trainer.children()
    os.kill(child, signal.SIGSTOP)
    trainer.post(f"/jobs/{job}/cancel")
    trainer.wait_for_job(job, "cancelled")
    wait_for(lambda: not alive(child), 20, lambda: "it goes on")


def test_a_queued_job_is_cancelled_at_once_and_never_runs(start: Start) -> None:
    trainer = start().wait_ready()
    dataset = trainer.upload(restaurants(40))
    first = trainer.submit("e2e", dataset, hyperparameters=LONG)
    second = trainer.submit("e2e", dataset)
    trainer.wait_for_step(first, 1)
    assert trainer.post(f"/jobs/{second}/cancel").json()["state"] == "cancelled"
    trainer.post(f"/jobs/{first}/cancel")
    trainer.wait_for_job(first, "cancelled")
    third = trainer.submit("e2e", dataset)
    trainer.wait_for_job(third, "succeeded")
    assert trainer.job(second)["started_at"] is None


def test_a_stream_goes_on_behind_the_last_event_and_ends_with_the_job(start: Start) -> None:
    trainer = start().wait_ready()
    job = trainer.submit("e2e", trainer.upload(restaurants(40)))
    trainer.wait_for_job(job, "succeeded")
    whole = list(trainer.watch(job))
    rest = list(trainer.watch(job, after="3"))
    assert rest == whole[3:]
    last = httpx.get(
        f"{trainer.url}/jobs/{job}/events", headers={"last-event-id": str(len(whole))}, timeout=60, verify=PLAIN
    )
    assert last.status_code == 204


def test_a_stream_with_nothing_to_tell_says_that_it_lives(start: Start) -> None:
    trainer = start("--workers", "0", "--heartbeat-s", "0.1").wait_ready()
    job, comments = trainer.submit("e2e", trainer.upload(restaurants(10))), 0
    with trainer.client() as client, client.stream("GET", f"/jobs/{job}/events") as stream:
        for line in stream.iter_lines():
            comments += line.startswith(":")
            if comments == 3:
                break
    assert comments == 3


@pytest.mark.slow
def test_jobs_in_every_state_survive_a_kill_of_the_service(start: Start) -> None:
    trainer = start().wait_ready()
    dataset = trainer.upload(restaurants(40))
    succeeded = trainer.submit("e2e", dataset)
    trainer.wait_for_job(succeeded, "succeeded")
    failed = trainer.submit("e2e", dataset, start_text="too short", hyperparameters={"prefix_length": 40})
    assert trainer.wait_for_job(failed, "failed")["failure"]["code"] == "invalid_parameter"
    cancelled = trainer.submit("e2e", dataset, hyperparameters=LONG)
    trainer.wait_for_step(cancelled, 1)
    trainer.post(f"/jobs/{cancelled}/cancel")
    trainer.wait_for_job(cancelled, "cancelled")
    running = trainer.submit("e2e", dataset, hyperparameters={"epochs": 40})
    queued = trainer.submit("other", dataset)
    trainer.wait_for_step(running, 5)
    before = {job: trainer.job(job) for job in (succeeded, failed, cancelled)}
    [child] = trainer.children()
    trainer.signal(signal.SIGKILL)
    trainer.wait()
    wait_for(lambda: not alive(child), 20, lambda: "its child goes on")

    again = start().wait_ready()
    assert {job: again.job(job) for job in before} == before
    again.wait_for_job(running, "succeeded")
    again.wait_for_job(queued, "succeeded")


def test_a_signal_hands_running_jobs_back_with_all_that_was_trained(start: Start) -> None:
    trainer = start().wait_ready()
    job = trainer.submit("e2e", trainer.upload(restaurants(40)), hyperparameters={**LONG, "checkpoint_every": 100000})
    trainer.wait_for_step(job, 8)
    reached = trainer.job(job)["progress"]["step"]
    trainer.signal(signal.SIGTERM)
    assert trainer.wait() == 0
    again, seen = start().wait_ready(), list[int]()

    def went_on() -> bool:
        seen.append(int(again.job(job)["progress"].get("step", reached)))  # none while it loads
        return bool(seen[-1] > reached)

    wait_for(went_on, PATIENCE_S, lambda: again.log.read_text()[-2000:])
    assert min(seen) >= reached, "began anew"
    assert again.job(job)["attempt"] == 1


def test_a_process_that_is_killed_for_memory_fails_its_job_and_the_service_lives_on(start: Start) -> None:
    trainer = start().wait_ready()
    dataset = trainer.upload(restaurants(40))
    job = trainer.submit("e2e", dataset, hyperparameters=LONG)
    trainer.wait_for_step(job, 1)
    [child] = trainer.children()
    os.kill(child, signal.SIGKILL)
    failed = trainer.wait_for_job(job, "failed")
    assert failed["failure"]["code"] == "out_of_memory"
    trainer.wait_for_job(trainer.submit("e2e", dataset), "succeeded")


def test_a_job_whose_data_does_not_fit_its_backbone_says_which_line(start: Start) -> None:
    trainer = start().wait_ready()
    lines = [*restaurants(40), {"input": "x " * 20_000, "target": "too long"}]
    failed = trainer.wait_for_job(trainer.submit("e2e", trainer.upload(lines), hold_out=0), "failed")
    assert failed["failure"]["code"] == "invalid_data"
    assert "line 41" in failed["failure"]["message"]


def test_a_job_starts_from_another_version_and_moves_no_alias_where_none_is_wanted(
    start: Start, world: TinyWorld, tmp_path: Path
) -> None:
    trainer = start().wait_ready()
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        first = registry.publish("default", "e2e", world.prefix(length=3), record={})
    job = trainer.submit(
        "e2e", trainer.upload(restaurants(40)), start_from="e2e", alias=None, hyperparameters={"method": "direct"}
    )
    assert trainer.job(job)["spec"]["start_from"] == f"default/e2e@{first.version}"
    done = trainer.wait_for_job(job, "succeeded")
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        task = registry.inspect("default", "e2e")
        assert task.aliases == {"production": first.version}
        assert {info.version for info in task.versions} == {first.version, done["version"]}
        made = read_prefix(registry.fetch("default", done["version"]))
    assert made.spec.origin["hyperparameters"]["method"] == "direct"
    assert first.version in json.dumps(made.spec.origin)


def test_the_process_that_trains_has_no_credentials(world: TinyWorld, tmp_path: Path) -> None:
    secret = "of-the-registry"
    names = ("PREFIXD_TRAINER_REGISTRY", "PREFIXD_TRAINER_REDIS", "PREFIXD_REGISTRY", "PREFIXD_KEY", "AWS_KEY")
    options = ("--data", str(tmp_path / "data"), "--backbone", f"tiny={world.folder}")
    with (
        RedisServer(password=secret, append_only=True) as redis,
        TrainerProcess(tmp_path, *options, env=dict.fromkeys(names, redis.url)) as trainer,
    ):
        job = trainer.wait_ready().submit("e2e", trainer.upload(restaurants(40)), hyperparameters=LONG)
        trainer.wait_for_step(job, 1)
        assert secret.encode() in Path(f"/proc/{trainer.process.pid}/environ").read_bytes()
        [child] = trainer.children()
        told = Path(f"/proc/{child}/environ").read_bytes() + Path(f"/proc/{child}/cmdline").read_bytes()
        assert secret.encode() not in told
        assert b"PREFIXD" not in told
        assert not any(secret in path.read_text() for path in (tmp_path / "data").rglob("*.json"))
        of_redis = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
        opened = [path.readlink().name for path in Path(f"/proc/{child}/fd").iterdir()]
        assert opened and not any(f"socket:[{inode}]" in opened for inode in of_redis)


def test_a_job_starts_from_a_text_and_keeps_its_first_position(start: Start, tmp_path: Path) -> None:
    trainer = start().wait_ready()
    text = "Blue Spice is a coffee shop in the city centre."
    dataset, options = trainer.upload(restaurants(40)), {"prefix_length": 4, "learning_rate": 1e-12}
    jobs = [
        trainer.submit("e2e", dataset, start_text=text, hyperparameters={**options, "seed": seed}) for seed in (1, 2)
    ]
    versions = [trainer.wait_for_job(job, "succeeded")["version"] for job in jobs]
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        made = [read_prefix(registry.fetch("default", version)) for version in versions]
    assert made[0].spec.origin["hyperparameters"]["method"] == "direct"
    assert "text" in json.dumps(made[0].spec.origin["initial"])
    first, second = (prefix.tensors["decoder.key"] for prefix in made)
    torch.testing.assert_close(first, second)  # of the text, not of the seed


def test_an_upload_of_200_000_lines_takes_no_more_memory_than_one_of_a_thousand(start: Start, tmp_path: Path) -> None:
    trainer = start("--workers", "0").wait_ready()

    def upload(count: int) -> dict[str, Any]:
        line = '{"input": "name : place %d | food : ' + "x" * 40 + '", "target": "it is"}\n'
        answer = trainer.post("/datasets", content=((line % number).encode() for number in range(count)))
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body

    upload(1000)
    before = peak_memory(trainer.process.pid)
    info = upload(200_000)
    assert info["lines"] == 200_000
    assert info["bytes"] > 16_000_000
    assert peak_memory(trainer.process.pid) - before < 8 << 20
    with trainer.client() as client:
        assert client.delete(f"/datasets/{info['dataset']}").status_code == 204
        assert client.get(f"/datasets/{info['dataset']}").status_code == 404


def peak_memory(pid: int) -> int:
    """Bytes of main memory that a process has ever had at once."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10
