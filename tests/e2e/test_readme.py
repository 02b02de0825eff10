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

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ADDRESS = "localhost:8000"


def block(language: str, containing: str) -> str:
    """The README's fenced block of ``language`` that holds ``containing``."""
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in b]
    assert len(found) == 1, f"{len(found)} {language} blocks with {containing!r}"
    return str(found[0])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `make serve` answers, as the README starts it."""
    assert "make serve" in block("bash", "make serve")
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("make install has not run in this checkout")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("serve")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["make", "serve", f"PORT={port}", f"REGISTRY={folder / 'registry'}"],
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "MAKEFLAGS": ""},
        )  # fmt: skip
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/ready", process, folder / "log")
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
    command = block("bash", "curl").replace(ADDRESS, address)
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
