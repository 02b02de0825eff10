"""The prefix commands and the client through a running server: the same operations, the same answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.client import RemoteRegistry
from prefixes.errors import Conflict, IncompatiblePrefix, InvalidArtifact, TaskNotFound
from prefixes.formats.peft_export import export_peft
from prefixes.registry import open_registry
from prefixes.registry.base import NOWHERE
from prefixes.spec import TaskRef
from tests.support.paths import ROOT
from tests.support.prefixes import make_prefix
from tests.support.server import ServerProcess, TinyWorld, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def registry_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"disk://{tmp_path_factory.mktemp('registry')}"


@pytest.fixture(scope="module")
def server(
    world: TinyWorld, registry_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with ServerProcess(folder, "--backbone", str(world.folder), "--registry", registry_url) as process:
        yield process.wait_ready()


@pytest.fixture
def remote(server: ServerProcess) -> Iterator[RemoteRegistry]:
    registry = RemoteRegistry(server.url)
    yield registry
    registry.close()


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFIXD_")}
    done = subprocess.run(
        [sys.executable, "-m", "prefixd", "prefixes", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


def test_the_client_keeps_the_registrys_promises(world: TinyWorld, remote: RemoteRegistry, registry_url: str) -> None:
    data = [world.prefix(seed=seed) for seed in range(2)]
    first = remote.publish("default", "client", data[0], record={"bleu": 68.2})
    second = remote.publish("default", "client", data[1], alias="canary", record={})
    local = open_registry(registry_url)
    assert remote.inspect("default", "client") == local.inspect("default", "client")
    assert first.record == {"bleu": 68.2}
    assert remote.resolve(TaskRef.parse("client")).version == first.version
    assert remote.resolve(TaskRef.parse("client@canary")).version == second.version
    assert remote.download("default", "client", second.version) == data[1]
    assert remote.fetch("default", first.version) == data[0]
    assert remote.promote("default", "client", second.version).aliases["production"] == second.version
    with pytest.raises(Conflict, match="expected it at"):
        remote.promote("default", "client", second.version, expected_current=first.version)
    back = remote.rollback("default", "client", expected_current=second.version)
    assert back == local.inspect("default", "client")
    with pytest.raises(Conflict, match="expected it at"):
        remote.rollback("default", "client", expected_current=second.version)
    with pytest.raises(Conflict, match="expected an earlier version"):
        remote.rollback("default", "client")
    assert remote.publish("default", "client", data[0], alias=None, record={}).published_at == first.published_at
    assert "default/client" in [f"{task.tenant}/{task.name}" for task in remote.tasks("default")]
    remote.check()
    remote.delete("default", "client")
    assert remote.undelete("default", "client") == local.inspect("default", "client")
    with pytest.raises(Conflict, match="expected no task of that name"):
        remote.undelete("default", "client")
    remote.delete("default", "client")
    for call in (
        lambda: remote.inspect("default", "client"),
        lambda: remote.fetch("default", first.version),
        lambda: remote.delete("default", "client"),
    ):
        with pytest.raises(TaskNotFound):
            call()


def test_a_publish_with_a_key_is_made_once_through_the_server(world: TinyWorld, remote: RemoteRegistry) -> None:
    data = [world.prefix(seed=seed) for seed in range(2)]
    remote.publish("default", "once", data[1], record={})
    first = remote.publish("default", "once", data[0], record={"bleu": 68.2}, idempotency_key="job-1")
    task = remote.rollback("default", "once")
    for again in (data[0], data[1], b"junk"):
        assert remote.publish("default", "once", again, record={"late": True}, idempotency_key="job-1") == first
        assert remote.inspect("default", "once") == task
    remote.delete("default", "once")
    with pytest.raises(Conflict, match="expected a publish key that is new"):
        remote.publish("default", "once", data[0], record={}, idempotency_key="job-1")


def test_a_publish_through_the_server_compares_before_it_sets(world: TinyWorld, remote: RemoteRegistry) -> None:
    first, second = (world.prefix(seed=seed) for seed in range(2))
    made = remote.publish("default", "compared", first, expected_current=NOWHERE, record={}, note="the first")
    with pytest.raises(Conflict, match="expected no such alias"):
        remote.publish("default", "compared", second, expected_current=NOWHERE, record={})
    moved = remote.publish("default", "compared", second, expected_current=made.version, record={})
    assert remote.inspect("default", "compared").aliases == {"production": moved.version}


def test_refused_uploads_come_back_as_the_errors_that_they_are(world: TinyWorld, remote: RemoteRegistry) -> None:
    with pytest.raises(InvalidArtifact):
        remote.publish("default", "bad", world.prefix()[:-1], record={})
    with pytest.raises(IncompatiblePrefix, match="fingerprint") as caught:
        other = write_prefix(make_prefix(type(world.spec)(**{**vars(world.spec), "fingerprint": "sha256:" + "1" * 64})))
        remote.publish("default", "bad", other, record={})
    assert caught.value.detail["expected"] == world.spec.fingerprint
    with pytest.raises(TaskNotFound):
        remote.inspect("default", "bad")


def test_every_command_works_on_the_server_as_on_the_registry(
    world: TinyWorld, server: ServerProcess, registry_url: str, tmp_path: Path
) -> None:
    there = ("--server", server.url, "--json")
    here = ("--registry", registry_url, "--json")
    paths = []
    for seed in (5, 6):
        paths.append(tmp_path / f"{seed}.safetensors")
        paths[-1].write_bytes(world.prefix(seed=seed))
    versions = [version_of(read_prefix(path.read_bytes())) for path in paths]

    def answer(*arguments: str) -> Any:
        return json.loads(run(*arguments).stdout)

    assert answer("publish", str(paths[0]), "--task", "cli", *there)["version"] == versions[0]
    assert answer("publish", str(paths[1]), "--task", "cli", *here)["version"] == versions[1]
    inspected = answer("inspect", "cli", *there)
    assert inspected == answer("inspect", "cli", *here)
    listed = [{**item, "resident": None} for item in answer("list", *there)["prefixes"]]
    assert listed == [{**item, "resident": None} for item in answer("list", *here)["prefixes"]]
    assert answer("promote", f"cli@{versions[0][:20]}", *there)["aliases"]["production"] == versions[0]
    assert answer("rollback", "cli", *there)["aliases"]["production"] == versions[1]
    assert answer("export", "artifact", "cli", str(tmp_path / "out"), *there)["version"] == versions[1]
    assert (tmp_path / "out").read_bytes() == paths[1].read_bytes()
    backbone = ("--backbone", str(world.folder))
    assert answer("export", "peft", "cli", str(tmp_path / "peft"), *backbone, *there)["version"] == versions[1]
    options = ("--task", "cli-peft", *backbone)
    imported = answer("import", "peft", str(tmp_path / "peft"), *options, *there)
    assert imported["spec"]["sites"] == inspected["versions"][0]["spec"]["sites"]
    assert answer("verify", "cli", "--backbone", str(world.folder), *there)["bad"] == 0
    assert "error: task default/nothing" in run("inspect", "nothing", *there, code=1).stderr
    for task in ("cli", "cli-peft"):
        assert answer("delete", task, "--yes", *there)["deleted"]
        assert answer("undelete", task, *there)["task"] == f"default/{task}"
        assert answer("delete", task, "--yes", *here)["deleted"]


def test_an_imported_prefix_is_served_at_once(world: TinyWorld, server: ServerProcess, tmp_path: Path) -> None:
    export_peft(make_prefix(world.spec, length=4, seed=9), tmp_path / "adapter", world.spec)
    options = ("--task", "served", "--backbone", str(world.folder), "--server", server.url, "--json")
    version = json.loads(run("import", "peft", str(tmp_path / "adapter"), *options).stdout)["version"]
    with server.client() as client:
        parameters = {"max_new_tokens": 3}
        answer = client.post("/generate", json={"task": "served", "input": "Blue", "parameters": parameters}).json()
        assert answer["version"] == version
        assert answer["usage"]["prefix_tokens"] == 4
