"""The composed services make a registry at their first start alone: an emptied Redis is an outage ever after."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from prefixes.errors import RegistryMissing
from prefixes.registry import open_registry, open_to_serve
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.secret import hash_line, new_id, new_secret, parse_secret
from server.settings import Settings
from server.web.settings_sources import load_settings
from tests.support.paths import ROOT
from tests.support.redis_server import RedisServer
from trainer.service.settings import TrainerSettings

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(autouse=True)
def empty(server: RedisServer) -> None:
    server.flush()


def keep(file: Path, url: str, given: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PREFIXD_REGISTRY": url, "PREFIXD_REGISTRY_ID": given, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "docker/keep_registry_id.py"), str(file)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def kept(file: Path) -> str | None:
    """The id that a server and a trainer read there."""
    found = load_settings(Settings, {}, config=file).registry_id
    assert load_settings(TrainerSettings, {}, config=file).registry_id == found
    return found


def test_after_the_first_start_no_server_makes_a_registry(server: RedisServer, tmp_path: Path) -> None:
    file = tmp_path / "registry.toml"
    assert keep(file, server.url).returncode == 0
    registry_id = kept(file)
    with closing(open_to_serve(server.url, registry_id=registry_id)) as registry:
        assert registry.id == registry_id
    server.flush()
    again = keep(file, server.url)
    assert again.returncode == 0 and f'kept, registry_id = "{registry_id}"' in again.stdout
    with pytest.raises(RegistryMissing):
        open_to_serve(server.url, registry_id=kept(file))
    with server.client() as client:
        assert client.dbsize() == 0


def test_a_new_registry_is_closed_before_any_service_starts(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {name: new_secret(new_id()) for name in ("operator", "metrics")}
    for name, secret in secrets.items():
        presented = parse_secret(secret)
        assert presented is not None
        (tmp_path / f"{name}_hash").write_text(hash_line(presented))
        monkeypatch.setenv(f"PREFIXD_{name.upper()}_HASH_FILE", str(tmp_path / f"{name}_hash"))
    assert keep(tmp_path / "registry.toml", server.url).returncode == 0
    with closing(open_to_serve(server.url, registry_id=kept(tmp_path / "registry.toml"))) as registry:
        ring = Keyring(registry.tenancy, 60)
        assert ring.closed
        assert {tuple(key.scopes) for key in ring.known.tenancy.keys.values()} == {("operator",), ("metrics",)}
    server.flush()
    (tmp_path / "operator_hash").write_text("no hash")
    refused = keep(tmp_path / "other.toml", server.url)
    assert refused.returncode == 1 and "expected one line" in refused.stderr
    assert not (tmp_path / "other.toml").exists()


def test_the_id_of_a_registry_that_is_there_is_taken(server: RedisServer, tmp_path: Path) -> None:
    with closing(open_registry(server.url)) as registry:
        assert keep(tmp_path / "registry.toml", server.url).returncode == 0
        assert kept(tmp_path / "registry.toml") == registry.id


def test_an_id_of_yours_is_taken_and_makes_nothing(server: RedisServer, tmp_path: Path) -> None:
    assert keep(tmp_path / "registry.toml", server.url, "my-registry").returncode == 0
    assert kept(tmp_path / "registry.toml") == "my-registry"
    with server.client() as client:
        assert client.dbsize() == 0


@pytest.mark.parametrize(("given", "told"), [('a"b', "expected 1 to 64 of"), ("", "Redis cannot be used")])
def test_what_cannot_be_kept_is_told_and_leaves_no_file(tmp_path: Path, given: str, told: str) -> None:
    failed = keep(tmp_path / "registry.toml", "redis://127.0.0.1:1", given)
    assert failed.returncode == 1 and told in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_composed_services_read_the_id_that_is_kept() -> None:
    identity = SERVICES["identity"]
    file = identity["entrypoint"][-1]
    folder = str(Path(file).parent)
    assert identity["volumes"] == ["server-secret:/run/prefixd/secrets:ro", f"identity:{folder}"]
    assert identity["restart"] == "no"
    for name, variable in (("server", "PREFIXD_CONFIG"), ("trainer", "PREFIXD_TRAINER_CONFIG")):
        service = SERVICES[name]
        assert service["environment"][variable] == file
        assert f"identity:{folder}:ro" in service["volumes"]
        assert service["depends_on"]["identity"] == {"condition": "service_completed_successfully"}
    assert identity["environment"]["PREFIXD_REGISTRY"] == SERVICES["server"]["environment"]["PREFIXD_REGISTRY"]
    assert "identity" in COMPOSE["volumes"]
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert re.search(rf"install -d -o prefixd .*{folder}", dockerfile), "else the volume belongs to root"
    assert identity["entrypoint"][1] == "/opt/prefixd/keep_registry_id.py"
    assert re.search(r"^COPY .*docker/keep_registry_id.py.* /opt/prefixd/$", dockerfile, re.M)
