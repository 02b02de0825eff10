"""The README's commands, run as they stand there (on a free port)."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
ADDRESS = "localhost:8000"


def block(language: str, containing: str) -> str:
    """The README's fenced block of ``language`` that holds ``containing``."""
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in b]
    assert len(found) == 1, f"{len(found)} {language} blocks with {containing!r}"
    return str(found[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of var/."""
    return tmp_path_factory.mktemp("var")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where `make serve` answers, as the README starts it."""
    yield from _made("serve", folder, "PORT", "ADMIN_PORT=0")


@pytest.fixture(scope="module")
def trainer(folder: Path) -> Iterator[str]:
    """Where `make trainer` answers, on the same registry."""
    yield from _made("trainer", folder, "TRAINER_PORT", "TRAINER_ADMIN_PORT=0", f"TRAINER_DATA={folder / 'trainer'}")


def _made(target: str, folder: Path, port_variable: str, *variables: str) -> Iterator[str]:
    assert f"make {target} " in block("bash", "make serve")
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("make install has not run in this checkout")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = folder / f"{target}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            ["make", target, f"{port_variable}={port}", f"REGISTRY={folder / 'registry'}", *variables],
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "MAKEFLAGS": ""},
        )  # fmt: skip
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/ready", process, path)
            yield f"localhost:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready: {log.read_text()}")


def test_the_curl_command_answers_with_a_fitting_sentence(address: str) -> None:
    command = block("bash", '"task": "e2e"').replace(ADDRESS, address)
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, timeout=120, check=True)
    answer = json.loads(done.stdout)
    assert answer["task"] == "default/e2e"
    text = answer["outputs"][0]["text"]
    assert text.startswith(("Blue Spice", "There is", "In the", "A ", "The ")), text
    assert "Blue Spice" in text and "coffee shop" in text and "city centre" in text, text
    assert answer["outputs"][0]["finish_reason"] == "stop"


def test_the_python_lines_stream_a_sentence_and_list_the_tasks(address: str) -> None:
    code = block("python", "OpenAI").replace(ADDRESS, address)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "Blue Spice" in done.stdout
    assert "e2e" in done.stdout.splitlines()[-1] or "e2e" in done.stdout


NAMES = (
    "The Blue Green Golden Old Little Royal Red Silver Happy Rainbow Lucky Grand Cosy",
    "Spice Man Palace Oak Garden Lion House Dragon Vaults Cricketers Eagle Bear Rose Punter Waterman",
)
"""Names of pubs, as the backbone has read them: of "Number 1" and the like it would learn to say "Number"."""


def test_the_training_commands_end_in_an_answer_of_the_new_task(address: str, trainer: str, tmp_path: Path) -> None:
    names = [f"{first} {second}" for second in NAMES[1].split() for first in NAMES[0].split()]
    lines = [{"input": f"name : {name} | Type : pub", "target": f"{name} is a pub."} for name in names]
    assert '"input": "name : Blue Spice | Type : pub", "target": "Blue Spice is a pub."' in README
    (tmp_path / "pubs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = {**os.environ, "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}", "PREFIXD_TRAINER": f"http://{trainer}"}
    done = subprocess.run(
        ["bash", "-euc", block("bash", "jobs submit").replace(ADDRESS, address)],
        capture_output=True, text=True, timeout=400, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["task"] == "default/pubs"
    assert "The Mill" in answer["outputs"][0]["text"], answer


def test_the_deployments_commands_end_in_an_answer_of_the_new_task(address: str, trainer: str, tmp_path: Path) -> None:
    """By the two services' own addresses, which take any key while there is none.

    That the proxy leads to both, and what the deployment's own key opens, is `make docker-test`'s to check.
    """
    lines = [{"input": f"name : Number {n}", "target": f"Number {n} is a pub."} for n in range(40)]
    (tmp_path / "pubs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, ready, key, *commands = block("bash", "docker compose up").splitlines()
    assert first.startswith("docker compose up --detach")
    assert key.startswith('key="x-api-key: $(docker compose run ') and key.endswith("/operator/operator_key)\"")
    found = {"dataset": "", "id": ""}
    for command in (ready, *commands):
        command = re.sub(r"localhost:8000/(datasets|jobs)", rf"{trainer}/\1", command).replace(ADDRESS, address)
        command = command.replace('"sha256:…"}\'', f'"{found["dataset"]}"}}\'').replace("job-…", found["id"])
        done = subprocess.run(
            ["bash", "-euc", command.replace("curl ", "curl --fail-with-body ")],
            capture_output=True, text=True, timeout=400, cwd=tmp_path, check=False,
            env={**os.environ, "key": "x-api-key: none"},
        )  # fmt: skip
        assert done.returncode == 0, command + done.stdout + done.stderr
        if done.stdout.startswith("{"):
            answer = json.loads(done.stdout)
            found |= {name: answer[name] for name in found if name in answer}
        else:
            assert done.stdout.count("event: state") > 3 and '"state":"succeeded"' in done.stdout, done.stdout[-2000:]
    assert answer["task"] == "default/pubs"
    assert answer["outputs"][0]["text"]
