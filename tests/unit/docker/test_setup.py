"""The setup of the deployment: passwords and keys are made once, kept, replaced by one's own, and have few readers."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from prefixes.registry import open_registry
from prefixes.tenancy.secret import new_id, new_secret, parse_secret
from server.settings import Settings
from server.web.opening import open_keyring
from server.web.settings_sources import load_settings
from tests.support.paths import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
FILES = ("secrets/redis_password", "secrets/grafana_password", "operator/key", "metrics/key")
HASHES = ("secrets/operator_hash", "secrets/metrics_hash")

Setup = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    for folder in ("secrets", "operator", "metrics", "given"):
        (tmp_path / folder).mkdir()

    def run(**given: str) -> subprocess.CompletedProcess[str]:
        for name, value in given.items():
            (tmp_path / "given" / name).write_text(value)
        script = "import setup_secrets as s, pathlib, sys; sys.exit(s.main(*map(pathlib.Path, sys.argv[1:])))"
        return subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "secrets"), str(tmp_path / "given")],
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'docker'}:{ROOT}"}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def values(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in (*FILES, *HASHES)}


def test_secrets_are_made_once_and_never_printed(setup: Setup, tmp_path: Path) -> None:
    first = setup()
    made = values(tmp_path)
    assert first.returncode == 0 and first.stdout.count(": made") == 4
    assert not any(value.strip() in first.stdout for value in made.values())
    assert setup().stdout.count(": kept") == 4 and values(tmp_path) == made
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in made}
    assert modes.pop("operator/key") == 0o400 and set(modes.values()) == {0o444}


def test_ones_own_take_their_place(setup: Setup, tmp_path: Path) -> None:
    setup()
    secret = new_secret(new_id())
    assert setup(operator_key=secret + "\n", redis_password="mine").returncode == 0
    presented = parse_secret(secret)
    assert presented is not None
    found = values(tmp_path)
    assert (found["operator/key"], found["secrets/redis_password"]) == (secret, "mine")
    assert found["secrets/operator_hash"] == f"{presented.key_id} {presented.digest}\n"
    refused = setup(operator_key="hunter2")
    assert refused.returncode == 1 and "pfx_" in refused.stderr and "hunter2" not in refused.stderr


def test_services_make_the_keys_of_their_hashes(setup: Setup, tmp_path: Path) -> None:
    setup()
    given = {f"{name}_hash_file": str(tmp_path / f"secrets/{name}_hash") for name in ("operator", "metrics")}
    settings = load_settings(Settings, {"registry": str(tmp_path / "registry"), **given}, config=None)
    with closing(open_registry(settings.registry)) as registry:
        ring = open_keyring(registry.tenancy, settings, ["0.0.0.0"])
        for name in ("operator", "metrics"):
            presented = parse_secret((tmp_path / name / "key").read_text())
            assert presented is not None
            key = ring.find(presented)
            assert key is not None
            assert key.scopes == {name}


def test_each_keys_secret_has_one_reader() -> None:
    def mounts(volume: str) -> set[str]:
        return {
            name
            for name, service in SERVICES.items()
            if any(mount.startswith(f"{volume}:") for mount in service.get("volumes", []))
        }

    assert mounts("operator") == {"setup"}
    assert mounts("metrics") == {"setup", "prometheus"}
    scrapes = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert {scrape["authorization"]["credentials_file"] for scrape in scrapes} == {"/run/prefixd/metrics/key"}
    for service, prefix in (("server", "PREFIXD"), ("trainer", "PREFIXD_TRAINER")):
        environment = SERVICES[service]["environment"]
        assert environment[f"{prefix}_OPERATOR_HASH_FILE"] == "/run/prefixd/secrets/operator_hash"
        assert environment[f"{prefix}_METRICS_HASH_FILE"] == "/run/prefixd/secrets/metrics_hash"
        assert f"{prefix}_OPEN_ACCESS" not in environment
