"""A real ``prefixd serve`` process over a tiny random backbone, for end-to-end tests.

Owns the process, its logs and small helpers around its API. Knows no test.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import httpx

from prefixes.artifact import write_prefix
from prefixes.backbone import load_backbone
from prefixes.spec import BackboneSpec
from tests.support.bart import random_bart_prefix, save_tiny_bart
from tests.support.callers import bearer
from tests.support.llama import save_tiny_llama
from tests.support.paths import ROOT
from tests.support.prefixes import make_prefix, save_tiny_gpt2
from tests.support.t5 import save_tiny_t5

PLAIN = False
"""For ``verify``: there is no TLS here, and httpx would read all certificates for each client, for 40 ms."""
WINDOW = 8192
LONG = {"max_new_tokens": 8000, "min_new_tokens": 8000}
"""Parameters of a request that runs for many seconds unless it is aborted."""


@dataclass(frozen=True)
class TinyWorld:
    """A backbone folder, its spec, and prefixes for it, at every site that it has."""

    folder: Path
    spec: BackboneSpec

    @property
    def sites(self) -> int:
        """At how many sites its prefixes stand."""
        return len(self.spec.sites)

    def prefix(self, *, length: int = 5, seed: int = 0, **fields: Any) -> bytes:
        """A valid artifact for this backbone."""
        if "encoder" in self.spec.sites:
            return write_prefix(random_bart_prefix(self.spec, length=length, seed=seed, **fields))
        return write_prefix(make_prefix(self.spec, length=length, seed=seed, **fields))


MAKERS: Final[Mapping[str, Callable[[Path], Any]]] = {
    "gpt2": lambda folder: save_tiny_gpt2(folder, n_positions=WINDOW),
    "bart": lambda folder: save_tiny_bart(folder, window=WINDOW),
    "llama": lambda folder: save_tiny_llama(folder, begins=True, max_position_embeddings=WINDOW),
    "t5": lambda folder: save_tiny_t5(folder, "t5 v1.1", window=WINDOW),
}


def make_world(folder: Path, family: str = "gpt2") -> TinyWorld:
    """A tiny backbone with a long window: a request with many ``min_new_tokens`` runs for as long as a test needs."""
    MAKERS[family](folder)
    return TinyWorld(folder, load_backbone(str(folder)).spec)


class ServerProcess:
    """``prefixd serve`` on a free port, with its log in a file."""

    command = "serve"

    def __init__(
        self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None, secret: str | None = None
    ) -> None:
        self.secret = secret
        self.log = folder / f"{self.command}.log"
        self.port, self.admin_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_url = f"http://127.0.0.1:{self.admin_port}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFIXD_")}
        ports = ("--port", str(self.port), "--admin-port", str(self.admin_port))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefixd", self.command, *ports, *arguments],
                cwd=ROOT, stdout=log, stderr=log, env={**environment, "OMP_NUM_THREADS": "1", **(env or {})},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def wait_ready(self, timeout_s: float = 120) -> Self:
        """Return once ``/ready`` answers 200."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"exited with {self.process.returncode}: {self.log.read_text()[-4000:]}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5, verify=PLAIN).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s: {self.log.read_text()[-4000:]}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End it whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def log_lines(self) -> list[dict[str, Any]]:
        """The log so far; raises if a line is not JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def client(self) -> httpx.Client:
        """A client for it, with the key's secret where there is one."""
        headers = bearer(self.secret) if self.secret else None
        return httpx.Client(base_url=self.url, timeout=60, verify=PLAIN, headers=headers)

    def admin_client(self) -> httpx.Client:
        """A client for its admin port."""
        return httpx.Client(base_url=self.admin_url, timeout=60, verify=PLAIN)

    def metrics(self) -> str:
        """What Prometheus would get."""
        return httpx.get(f"{self.admin_url}/metrics", timeout=60, verify=PLAIN).raise_for_status().text


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def upload(client: httpx.Client, task: str, data: bytes, **fields: str) -> httpx.Response:
    """``POST /prefixes``."""
    return client.post("/prefixes", data={"task": task, **fields}, files={"file": ("prefix.safetensors", data)})


def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Named server-sent events as (name, parsed data)."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def metric(server: ServerProcess, name: str) -> float:
    """The sum of a metric's samples, over all labels."""
    values = [
        float(line.rpartition(" ")[2])
        for line in server.metrics().splitlines()
        if line.split("{")[0].split(" ")[0] == name
    ]
    if not values:
        raise AssertionError(f"no metric {name}")
    return sum(values)


def wait_for_metric(server: ServerProcess, name: str, value: float, timeout_s: float = 20) -> None:
    """Return once the metric has the value."""
    deadline = time.monotonic() + timeout_s
    while (now := metric(server, name)) != value:
        if time.monotonic() > deadline:
            raise AssertionError(f"{name} is {now}, expected {value}")
        time.sleep(0.02)
