"""A real trainer's jobs do all their work confined, and hostile code in one of them gets nothing of the others."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prefixes.registry import open_registry
from tests.support.hostile import TOLD, install
from tests.support.paths import ROOT
from tests.support.redis_server import RedisServer
from tests.support.server import TinyWorld, make_world
from tests.support.trainer_process import Start, restaurants, trainers
from trainer.service.landlock import version

pytestmark = pytest.mark.skipif(version() == 0, reason="the kernel has no Landlock, or refuses it")

JAVA = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
SAID = "jobs' processes can read what the trainer's user can"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Its weights lie elsewhere, as in the hub's cache."""
    made = make_world(tmp_path_factory.mktemp("backbone"))
    weights = made.folder / "model.safetensors"
    weights.symlink_to(weights.rename(tmp_path_factory.mktemp("blobs") / "weights"))
    return made


@pytest.fixture
def start(world: TinyWorld, tmp_path: Path) -> Iterator[Start]:
    with trainers(tmp_path, world.folder) as start:
        yield start


def confined(pid: int) -> bool:
    """Landlock itself shows nowhere, but nothing else of ours sets this."""
    return "\nNoNewPrivs:\t1\n" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize(
    "metrics",
    [
        ["bleu", "chrf", "rouge"],
        pytest.param(
            ["nist", "meteor", "cider", "coco_rouge"],
            marks=[pytest.mark.slow, pytest.mark.skipif(not JAVA, reason="needs Java and pycocoevalcap")],
        ),
    ],
    ids=["python's scores", "java's scores"],
)
def test_a_confined_job_trains_is_scored_reports_and_publishes(
    start: Start, tmp_path: Path, metrics: list[str]
) -> None:
    """With no cache yet: kernels are compiled, fonts are looked for."""
    caches = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    trainer = start(env=caches)
    dataset, further = trainer.upload(restaurants(60)), trainer.upload(restaurants(9))
    evaluation = {"preset": "e2e", "metrics": metrics, "limit": 3}
    job = trainer.submit("e2e", dataset, validation_dataset=further, evaluation=evaluation)
    trainer.wait_for_step(job, 1)
    assert [confined(child) for child in trainer.children()] == [True]
    assert not confined(trainer.process.pid)
    done = trainer.wait_for_job(job, "succeeded")
    assert {name.replace("coco_rouge", "coco_rougeL") for name in metrics} - {"rouge"} <= set(done["result"]["scores"])
    with trainer.client() as client:
        assert "<svg" in client.get(f"/jobs/{job}/report").raise_for_status().text
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        assert registry.inspect("default", "e2e").aliases["production"] == done["version"]
    [log] = (tmp_path / "data").rglob("child.log")
    assert "denied" not in log.read_text().lower(), log.read_text()
    assert list((tmp_path / "cache/prefixd/jobs/default/numba").rglob("*.nbc"))
    assert list((tmp_path / "temporary").iterdir()) == []
    assert SAID not in trainer.log.read_text()


def test_hostile_code_in_one_job_finds_no_password_no_registry_and_no_other_job(
    start: Start, world: TinyWorld, tmp_path: Path
) -> None:
    with RedisServer(password="s3cret") as redis:
        arguments = ("--redis", f"redis://{redis.address}?password_file={redis.password_file}")
        honest = start(*arguments)
        theirs = honest.upload(restaurants(50))
        honest.wait_for_job(honest.submit("theirs", theirs), "succeeded")
        mine = honest.upload(restaurants(60))
        honest.kill()

        [dataset] = (tmp_path / "data").rglob(f"{theirs.removeprefix('sha256:')}.jsonl")
        [report] = (tmp_path / "data").rglob("report.html")
        asked = {
            "password": ("read", str(redis.password_file)),
            "redis": ("connect", str(redis.port)),
            "registry": ("list", str(tmp_path / "registry")),
            "dataset": ("read", str(dataset)),
            "report": ("read", str(report)),
            "through the trainer": ("symlink", str(redis.password_file)),
            "backbone": ("read", str(world.folder / "config.json")),
        }
        hostile = install(tmp_path / "hostile", asked)
        trainer = start(*arguments, env={"PYTHONPATH": f"{hostile}:{ROOT}"})
        job = trainer.submit("mine", mine)
        assert trainer.wait_for_job(job, "failed")["failure"]["code"] == "crashed"
        [told] = (tmp_path / "data").rglob(TOLD)
        assert json.loads(told.read_text()) == {**dict.fromkeys(asked, "EACCES"), "backbone": "done"}
        assert trainer.process.poll() is None


def test_a_trainer_says_where_its_jobs_can_read_what_it_can_and_they_work_there(start: Start) -> None:
    trainer = start("--no-confine-jobs")
    job = trainer.submit("e2e", trainer.upload(restaurants(40)))
    trainer.wait_for_step(job, 1)
    assert [confined(child) for child in trainer.children()] == [confined(os.getpid())]
    trainer.wait_for_job(job, "succeeded")
    [line] = [line for line in trainer.log_lines() if line["message"] == SAID]
    assert (line["level"], line["reason"]) == ("warning", "--no-confine-jobs")
