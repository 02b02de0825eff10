"""The two container engines that the deployment is tested with, behind one small interface.

Owns the commands of Docker (with its compose plugin) and of Podman (with buildah's builder and podman-compose), and how
Podman comes by images where no registry can be reached: a Debian base made with debootstrap, and Debian's packages in
the place of the public images. Knows no check.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, Protocol

from tests.support.paths import ROOT

PROJECT: Final = "prefixd-test"
DEBIAN: Final = "bookworm"
BASE: Final = f"localhost/{PROJECT}-base:{DEBIAN}"
SCALE: Final = {"server": 2, "trainer": 2}
RLIMITS: Final = 16384
"""Within what any host allows, where the engine's own defaults are beyond it."""


class CannotTest(Exception):
    """No engine, or one that lacks a part."""


class Engine(Protocol):
    """What the test needs of a container engine."""

    name: str
    has_grafana: bool

    def images(self, folder: Path) -> dict[str, str]:
        """Build and fetch what the compose file names; returns the variables that name the results."""

    def compose(self, variables: dict[str, str], override: Path) -> list[str]:
        """The compose command, up to its sub-command."""

    def up(self, compose: list[str], services: list[str], variables: dict[str, str]) -> None:
        """Create and start the services, in the background."""

    def override(self) -> dict[str, Any]:
        """What the compose files need on this engine, service by service."""

    def healthy(self, container: str) -> bool:
        """Does the container's own health check pass."""


def command(
    *arguments: str, check: bool = True, both: bool = False, env: dict[str, str] | None = None, timeout_s: float = 600
) -> str:
    """Run a command; returns its standard output, or ``both`` streams. Raises RuntimeError with their end."""
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.PIPE, text=True,
        timeout=timeout_s, cwd=ROOT, env={**os.environ, **(env or {})}, check=False,
    )  # fmt: skip
    if check and done.returncode:
        said = (done.stderr or done.stdout)[-3000:]
        raise RuntimeError(f"{' '.join(arguments)[:300]}: exit code {done.returncode}\n{said}")
    return done.stdout


def shown(*arguments: str) -> None:
    """Run a long command with its output on ours. Raises RuntimeError."""
    if subprocess.run(arguments, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        raise RuntimeError(f"{' '.join(arguments)[:300]}: failed")


def find_engine() -> Engine:
    """Docker where a daemon answers, else Podman. Raises CannotTest."""
    if shutil.which("docker") and not subprocess.run(
        ["sh", "-c", "docker info && docker compose version"], capture_output=True, check=False, timeout=60
    ).returncode:
        return Docker()
    missing = [
        tool for tool in ("podman", "buildah", "podman-compose", "runc", "iptables") if not shutil.which(tool)
    ]
    if missing:
        raise CannotTest(
            f"no Docker engine answers, and for Podman {', '.join(missing)} are missing: apt-get install "
            "podman buildah runc netavark aardvark-dns iptables podman-compose debootstrap"
        )
    return Podman()


class Docker:
    """The Docker engine, with the public images."""

    name = "docker"
    has_grafana = True

    def images(self, folder: Path) -> dict[str, str]:
        """The compose plugin builds, and pulls when it starts."""
        for target in ("server", "trainer"):
            shown(
                "docker", "build", "--file", "docker/Dockerfile", "--target", target,
                "--tag", f"prefixd-{target}:local", ".",
            )  # fmt: skip
        return {}

    def compose(self, variables: dict[str, str], override: Path) -> list[str]:
        """As in the documentation."""
        return ["docker", "compose", "-p", PROJECT, "-f", "docker-compose.yml", "-f", str(override)]

    def up(self, compose: list[str], services: list[str], variables: dict[str, str]) -> None:
        """As in the documentation."""
        scale = [word for service, count in SCALE.items() for word in ("--scale", f"{service}={count}")]
        command(*compose, "up", "--detach", *scale, *services, env=variables)

    def override(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def healthy(self, container: str) -> bool:
        """What the engine has found."""
        return command("docker", "inspect", "-f", "{{.State.Health.Status}}", container).strip() == "healthy"


class Podman:
    """Podman 4 or newer as root, with runc."""

    name = "podman"
    has_grafana = False

    def images(self, folder: Path) -> dict[str, str]:
        """Built on the public base where it can be pulled, else on one of our own, with Debian's packages."""
        variables = {
            "PREFIXD_SERVER_IMAGE": f"localhost/{PROJECT}-server:local",
            "PREFIXD_TRAINER_IMAGE": f"localhost/{PROJECT}-trainer:local",
        }
        arguments = _pip_arguments(folder)
        base = os.environ.get("PREFIXD_BASE")
        if base is None:
            base = BASE
            if subprocess.run(["podman", "image", "exists", BASE], check=False).returncode:
                _debootstrap(folder / "base")
        for service in ("redis", "proxy", "prometheus"):
            variables[f"{service.upper()}_IMAGE"] = image = f"localhost/{PROJECT}-{service}:{DEBIAN}"
            if subprocess.run(["podman", "image", "exists", image], check=False).returncode:
                self._build("docker/test/debian.Dockerfile", service, image, base, [])
        for target in ("server", "trainer"):
            self._build("docker/Dockerfile", target, f"localhost/{PROJECT}-{target}:local", base, arguments)
        return variables

    @staticmethod
    def _build(file: str, target: str, image: str, base: str, arguments: list[str]) -> None:
        shown(
            "podman", "build", "--quiet", "--format", "docker", "--network", "host", "--isolation", "chroot",
            "--build-arg", f"BASE={base}", *arguments, "--file", file, "--target", target, "--tag", image, ".",
        )  # fmt: skip

    def compose(self, variables: dict[str, str], override: Path) -> list[str]:
        """podman-compose, which hands on what runc needs."""
        return [
            "podman-compose", "--podman-run-args", "--runtime runc", "-p", PROJECT,
            "-f", "docker-compose.yml", "-f", str(override),
        ]  # fmt: skip

    def up(self, compose: list[str], services: list[str], variables: dict[str, str]) -> None:
        """Debian's podman-compose scales by the override alone; services are named, there is no grafana. It gives no
        network its range, so the one that has one is made here.
        """
        network = f"{PROJECT}_monitoring"
        command("podman", "network", "rm", "--force", network, check=False)
        subnet = variables["PREFIXD_MONITORING_SUBNET"]
        command("podman", "network", "create", "--internal", "--subnet", subnet, network)
        command(*compose, "up", "--detach", "--no-build", *services, env=variables)

    def override(self) -> dict[str, Any]:
        """Limits that runc can set, and two of each that scales."""
        limits: dict[str, Any] = {
            "ulimits": {name: {"soft": RLIMITS, "hard": RLIMITS} for name in ("nofile", "nproc")},
            "init": shutil.which("catatonit") is not None,  # what Podman starts as one
        }
        names = ("setup", "redis", "identity", "server", "trainer", "proxy", "prometheus")
        services: dict[str, Any] = {name: dict(limits) for name in names}
        for name, count in SCALE.items():
            services[name]["deploy"] = {"replicas": count}
        return {"services": services}

    def healthy(self, container: str) -> bool:
        """Run it now: without systemd nobody does it on time."""
        done = subprocess.run(["podman", "healthcheck", "run", container], capture_output=True, check=False)
        return done.returncode == 0


def _debootstrap(folder: Path) -> None:
    """A Debian with Python, as the image BASE."""
    if not shutil.which("debootstrap"):
        raise CannotTest("debootstrap is missing: apt-get install debootstrap")
    shown("debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", DEBIAN, str(folder))
    packed = folder.with_suffix(".tar")
    shown("tar", "-C", str(folder), "--exclude=./proc/*", "--exclude=./sys/*", "--exclude=./dev/*",
          "--exclude=./var/cache/apt/archives/*.deb", "-cf", str(packed), ".")  # fmt: skip
    shutil.rmtree(folder)
    shown("podman", "import", str(packed), BASE)
    packed.unlink()


def _pip_arguments(folder: Path) -> list[str]:
    """This machine's configuration of pip for the build: as a secret, with the local files that it names."""
    lines = command(sys.executable, "-m", "pip", "config", "list", check=False).splitlines()
    options = {}
    for line in lines:
        key, _, value = line.partition("=")
        options[key.rpartition(".")[2]] = value.strip("'\"")
    parser = configparser.RawConfigParser()
    parser["global"] = {**options, "timeout": "180"}
    file = folder / "pip.conf"
    with file.open("w") as handle:
        parser.write(handle)
    arguments = ["--secret", f"id=pip_conf,src={file}"]
    words = {word.removeprefix("file://") for value in options.values() for word in value.split()}
    for path in sorted(word for word in words if word.startswith("/") and Path(word).exists()):
        mounted = str(Path(path).parent) if Path(path).name == "simple" else path
        arguments += ["--volume", f"{mounted}:{mounted}:ro"]
    if any(Path(word).is_dir() and list(Path(word).glob("torch-*+cpu*")) for word in words if word.startswith("/")):
        arguments += ["--build-arg", "TORCH_INDEX=default"]
    if index := os.environ.get("TORCH_INDEX"):
        arguments += ["--build-arg", f"TORCH_INDEX={index}"]
    return arguments


def inspect(engine: Engine, container: str) -> dict[str, Any]:
    """All that the engine knows of a container."""
    description: list[dict[str, Any]] = json.loads(command(engine.name, "inspect", container))
    return description[0]
