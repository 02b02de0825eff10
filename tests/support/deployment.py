"""Replicas and a trainer on one registry, used as its operator and its customers do: by commands and with keys.

Owns the processes' start and small calls. Knows no test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.callers import bearer
from tests.support.paths import ROOT
from tests.support.redis_server import RedisServer
from tests.support.server import PLAIN, ServerProcess, TinyWorld, make_world
from tests.support.trainer_process import TrainerProcess

SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}


@dataclass
class Deployment:
    """A registry, the replicas on it, and the secret of its operator."""

    url: str
    replicas: list[ServerProcess]
    world: TinyWorld
    operator: str = ""

    def prefixd(self, *arguments: str, server: str | None = None, key: str | None = None, code: int = 0) -> Any:
        """A command's JSON, on the registry or through a server."""
        place = ("--registry", self.url) if server is None else ("--server", server)
        done = subprocess.run(
            [sys.executable, "-m", "prefixd", *arguments, *place, "--json"],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, **({"PREFIXD_KEY": key} if key else {})},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if code == 0 else done.stderr

    def key(self, tenant: str, scopes: str, *more: str) -> Any:
        """A new key, made as an operator does."""
        return self.prefixd("keys", "create", "--tenant", tenant, "--scopes", scopes, *more)


@contextmanager
def deployed_on(kind: str, folder: Path, *arguments: str) -> Iterator[Deployment]:
    """One server on a folder ("disk"), or two replicas on one Redis ("redis"), closed by an operator's key."""
    world = make_world(folder / "backbone")
    with ExitStack() as stack:
        url = str(folder / "registry")
        if kind == "redis":
            url = stack.enter_context(RedisServer(append_only=True)).url
        made = Deployment(url, [], world)
        made.operator = made.key("ops", "operator")["secret"]
        options = ("--backbone", str(world.folder), "--registry", url, "--threads", "1", "--deterministic")
        for number in range(2 if kind == "redis" else 1):
            (folder / str(number)).mkdir()
            # Beyond this machine, as is only allowed once there is a key.
            server = ServerProcess(folder / str(number), "--host", "0.0.0.0", *options, *arguments)
            made.replicas.append(stack.enter_context(server))
        for server in made.replicas:
            server.wait_ready()
        yield made


def trainer_of(deployed: Deployment, folder: Path) -> TrainerProcess:
    """A trainer on the same registry; the caller ends it."""
    places = ("--data", str(folder / "data"), "--registry", deployed.url)
    return TrainerProcess(folder, *places, "--backbone", f"tiny={deployed.world.folder}")


def call(server: ServerProcess, method: str, path: str, secret: str | None, **given: Any) -> httpx.Response:
    return httpx.request(
        method, f"{server.url}{path}", headers=bearer(secret) if secret else {}, timeout=60, verify=PLAIN, **given
    )


def generated(server: ServerProcess, task: str, secret: str) -> httpx.Response:
    return call(server, "POST", "/generate", secret, json={"task": task, "input": "Blue", "parameters": SHORT})


def published(server: ServerProcess, task: str, data: bytes, secret: str) -> httpx.Response:
    return call(server, "POST", "/prefixes", secret, data={"task": task}, files={"file": ("x.safetensors", data)})
