"""The composed services while a test runs: started, found, entered, killed, removed.

Owns their life and the ways in: the proxy's port from outside, everything else by running Python in a container, which
stands in the internal networks. Knows no check.
"""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from prefixes.tenancy.secret import new_id, new_secret
from tests.docker.engines import PROJECT, SCALE, Engine, command, inspect

REPLICAS: Final = SCALE["server"]
TRAINERS: Final = SCALE["trainer"]
START_S: Final = 240
LEASE_S: Final = 5
ADMIN_PORTS: Final = {"server": 8001, "trainer": 8101}
MONITORING: Final = "10.117.45.0/24"
REGISTRY: Final = "redis://trainer@redis:6379/0?password_file=/run/prefixd/secrets/redis_trainer_password"

_FETCH: Final = """
import sys, urllib.request
try:
    request = urllib.request.Request(sys.argv[1], headers={"x-api-key": sys.argv[2]})
    with urllib.request.urlopen(request, timeout=10) as answer:
        sys.stdout.write(answer.read().decode())
except OSError as error:
    sys.exit(str(error))
"""


class NotChecked(Exception):
    """What a check is about is not there with this engine."""


class Stack:
    """``docker compose up`` with two of each that scales, in a project of its own; gone afterwards with its volumes."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.services = ["setup", "redis", "identity", "server", "trainer", "proxy", "prometheus"]
        if engine.has_grafana:
            self.services.append("grafana")
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._variables = {"PREFIXD_PUBLISH": f"127.0.0.1:{port}", "GRAFANA_PORT": str(_free_port())}
        self._variables["PREFIXD_MONITORING_SUBNET"] = MONITORING  # beside a deployment that may run here
        self._variables["PREFIXD_TRAINER_THREADS"] = "1"  # two runs add in the same order
        self.secret = new_secret(new_id())
        (folder / "operator_key").write_text(self.secret)
        self._variables["OPERATOR_KEY_FILE"] = str(folder / "operator_key")
        folder.chmod(0o755)  # the trainer's user reads its data there
        self._data = folder / "data"
        self._data.mkdir(mode=0o755)
        override = engine.override()
        trainer = override.setdefault("services", {}).setdefault("trainer", {})
        trainer["volumes"] = [f"{self._data}:/data:ro"]  # Debian's podman-compose ignores volumes given to `run`
        trainer["environment"] = {"PREFIXD_TRAINER_LEASE_S": str(LEASE_S)}  # a killed trainer is soon missed
        self._override = folder / "override.yml"
        self._override.write_text(json.dumps(override))  # JSON is YAML
        self._folder = folder
        self._compose: list[str] = []

    def __enter__(self) -> Self:
        self._variables |= self.engine.images(self._folder)
        self._compose = self.engine.compose(self._variables, self._override)
        self._down()
        self.engine.up(self._compose, self.services, self._variables)
        return self

    def __exit__(self, *exception: object) -> None:
        self._down()

    def _down(self) -> None:
        unnamed = self._unnamed_volumes()
        command(*self._compose, "down", "--volumes", check=False, env=self._variables)
        if unnamed:
            command(self.engine.name, "volume", "rm", *unnamed, check=False)  # podman-compose leaves them

    def _unnamed_volumes(self) -> list[str]:
        names = [container for service in self.services for container in self.containers(service, stopped=True)]
        mounts = [mount for name in names for mount in self.inspect(name)["Mounts"]]
        return [m["Name"] for m in mounts if re.fullmatch(r"[0-9a-f]{64}", m.get("Name", ""))]

    def containers(self, service: str, *, stopped: bool = False) -> list[str]:
        """Names of a service's containers that run, or of all; in order."""
        names = command(
            self.engine.name, "ps", *(["--all"] if stopped else []), "--format", "{{.Names}}",
            "--filter", f"label=com.docker.compose.project={PROJECT}",
            "--filter", f"label=com.docker.compose.service={service}",
        )  # fmt: skip
        return sorted(names.split())

    def inspect(self, container: str) -> dict[str, Any]:
        """All that the engine knows of it."""
        return inspect(self.engine, container)

    def logs(self, container: str) -> str:
        """What it has written so far, on both streams."""
        return command("sh", "-c", f"{self.engine.name} logs {container} 2>&1")

    def execute(self, container: str, *arguments: str, check: bool = True) -> str:
        """Run a command inside; its output."""
        return command(self.engine.name, "exec", container, *arguments, check=check)

    def kill(self, container: str) -> None:
        """SIGKILL, at once."""
        command(self.engine.name, "kill", container)

    def stop(self, container: str) -> None:
        """SIGTERM, and wait for the drain."""
        command(self.engine.name, "stop", "--time", "150", container)

    def start(self, container: str) -> None:
        """Start it again."""
        command(self.engine.name, "start", container)

    def train(self, task: str, lines: list[dict[str, str]]) -> str:
        """Train in the trainer's container on data from outside, and publish; its output."""
        (self._data / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return command(
            *self._compose, "run", "--rm", "--no-deps", "-T", "trainer",
            "train", "--task", task, "--data", "/data/data.jsonl", "--method", "direct", "--epochs", "1",
            "--registry", REGISTRY, both=True, env=self._variables,
        )  # fmt: skip

    def inside(self, url: str) -> str:
        """GET from a server's container, in the internal networks. Raises RuntimeError."""
        return self.execute(self.containers("server")[0], "python", "-c", _FETCH, url, self.secret)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant query to Prometheus; its vector."""
        query = urllib.parse.quote(expression)
        answer = json.loads(self.inside(f"http://prometheus:9090/api/v1/query?query={query}"))
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def admin(self, container: str, path: str) -> str:
        """GET from a server's or trainer's own admin port."""
        port = ADMIN_PORTS["trainer" if container in self.containers("trainer") else "server"]
        return self.execute(container, "python", "-c", _FETCH, f"http://127.0.0.1:{port}{path}", self.secret)

    def metric(self, container: str, name: str) -> float:
        """The sum of a metric's samples on one server or trainer."""
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", self.admin(container, "/metrics"), re.M)
        return sum(float(value) for value in found)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout_s: float = 60
    ) -> tuple[int, dict[str, str], bytes]:
        """Through the proxy: status, headers in lower case, body. Raises OSError where no answer came."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={**self.headers, **(headers or {})}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    @property
    def headers(self) -> dict[str, str]:
        """Of a request with a JSON body, as the operator."""
        return {"content-type": "application/json", "x-api-key": self.secret}

    def answering(self, job: str = "prefixd") -> int:
        """How many servers, or of Prometheus' job ``prefixd-trainer`` trainers, answer Prometheus."""
        return sum(int(float(sample["value"][1])) for sample in self.query(f'up{{job="{job}"}} == 1'))


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = START_S) -> None:
    """Return once the condition holds; errors while it is looked at count as not yet. Raises AssertionError."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (OSError, RuntimeError, KeyError, ValueError, IndexError) as error:
            last = error
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s; last: {last}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
