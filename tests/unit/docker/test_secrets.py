"""Each reader has its own passwords and keys and no others: what ``setup`` writes, and what compose mounts."""

from __future__ import annotations

import hashlib
import importlib.util
import stat
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from prefixes.registry import open_registry
from prefixes.tenancy.secret import new_id, new_secret, parse_secret
from server.settings import Settings
from server.web.opening import open_keyring
from server.web.settings_sources import load_settings
from tests.support.paths import ROOT

SERVICES: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PLACE: Final = "/run/prefixd/secrets"
NEEDED: Final = {
    "redis": {"redis_password", "redis_probe_password", "users.acl"}, "grafana": {"grafana_password"},
    "server": {"redis_server_password", "operator_hash", "metrics_hash"},
    "trainer": {"redis_trainer_password"},
    "prometheus": {"metrics_key"}, "operator": {"operator_key"},
}  # fmt: skip
THEIRS: Final = {"redis", "grafana", "prometheus"}
"""Readers whose images have users of their own."""


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_secrets", ROOT / "docker/setup_secrets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for reader in NEEDED:
        (tmp_path / "secrets" / reader).mkdir(parents=True)
    return tmp_path / "secrets"


def found(folder: Path) -> dict[str, set[str]]:
    return {reader: {path.name for path in (folder / reader).iterdir()} for reader in NEEDED}


def test_every_reader_gets_what_it_needs_and_nothing_else(setup: ModuleType, folder: Path, tmp_path: Path) -> None:
    """One volume had all passwords, readable for all: Grafana's container had the password of Redis."""
    assert setup.main(folder, tmp_path) == 0
    assert found(folder) == NEEDED
    values = [path.read_text() for path in folder.rglob("redis*_password")]
    assert len(values) == len(set(values)) == 4 and min(map(len, values)) > 30
    assert not any(value in (folder / "redis/users.acl").read_text() for value in values)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert all(mode == (0o444 if path.parent.name in THEIRS else 0o400) for path, mode in modes.items()), modes


def test_passwords_stay_and_one_that_is_given_reaches_its_reader(
    setup: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.main(folder, tmp_path)
    before = {path: path.read_text() for path in folder.rglob("*_*")}
    setup.main(folder, tmp_path)
    assert len(before) > 8 and {path: path.read_text() for path in folder.rglob("*_*")} == before
    (tmp_path / "redis_password").write_text("of-mine\n")
    setup.main(folder, tmp_path)
    changed = {path for path, text in before.items() if path.read_text() != text}
    assert changed == {folder / "redis/redis_password"} and (folder / "redis/redis_password").read_text() == "of-mine"
    assert hashlib.sha256(b"of-mine").hexdigest() in (folder / "redis/users.acl").read_text()
    printed = capsys.readouterr().out
    assert "redis_password: taken from the compose secret" in printed and "of-mine" not in printed


def test_what_an_earlier_release_gave_to_readers_is_taken_back(
    setup: ModuleType, folder: Path, tmp_path: Path
) -> None:
    """It had one password of Redis for all, which may do everything, and made keys in the trainer too."""
    for reader in ("redis", "server", "trainer"):
        (folder / reader / "redis_password").write_text("of-all")
    for name in ("operator_hash", "metrics_hash"):
        (folder / "trainer" / name).write_text("hash")
    setup.main(folder, tmp_path)
    assert found(folder) == NEEDED
    assert [path.parent.name for path in folder.rglob("*_password") if path.read_text() == "of-all"] == ["redis"]


def test_ones_own_key_takes_the_place_and_what_is_none_is_refused(
    setup: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = new_secret(new_id())
    (tmp_path / "operator_key").write_text(secret + "\n")
    assert setup.main(folder, tmp_path) == 0
    presented = parse_secret(secret)
    assert presented is not None
    assert (folder / "operator" / "operator_key").read_text() == secret
    assert (folder / "server" / "operator_hash").read_text() == f"{presented.key_id} {presented.digest}\n"
    (tmp_path / "operator_key").write_text("hunter2")
    assert setup.main(folder, tmp_path) == 1
    told = capsys.readouterr()
    assert "pfx_" in told.err and "hunter2" not in told.err and secret not in told.out


def test_services_make_the_keys_of_their_hashes(setup: ModuleType, folder: Path, tmp_path: Path) -> None:
    setup.main(folder, tmp_path)
    given = {f"{name}_hash_file": str(folder / "server" / f"{name}_hash") for name in ("operator", "metrics")}
    settings = load_settings(Settings, {"registry": str(tmp_path / "registry"), **given}, config=None)
    with closing(open_registry(settings.registry)) as registry:
        ring = open_keyring(registry.tenancy, settings, ["0.0.0.0"])
        for reader, name in (("operator", "operator"), ("prometheus", "metrics")):
            presented = parse_secret((folder / reader / f"{name}_key").read_text())
            assert presented is not None
            key = ring.find(presented)
            assert key is not None
            assert key.scopes == {name}
    scrapes = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert {scrape["authorization"]["credentials_file"] for scrape in scrapes} == {f"{PLACE}/metrics_key"}
    for service in ("identity", "server"):
        environment = SERVICES[service]["environment"]
        assert environment["PREFIXD_OPERATOR_HASH_FILE"] == f"{PLACE}/operator_hash"
        assert environment["PREFIXD_METRICS_HASH_FILE"] == f"{PLACE}/metrics_hash"
    everywhere = {name for service in ("server", "trainer") for name in SERVICES[service]["environment"]}
    assert not [name for name in everywhere if "OPEN_ACCESS" in name or ("TRAINER" in name and "HASH" in name)]


def test_compose_mounts_to_each_service_its_own_secrets(setup: ModuleType) -> None:
    mounted: dict[str, list[tuple[str, str]]] = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            if target.startswith(PLACE):
                mounted.setdefault(name, []).append((source, target))
    assert sorted(mounted.pop("setup")) == sorted((f"{reader}-secret", f"{PLACE}/{reader}") for reader in NEEDED)
    assert mounted.pop("identity") == [("server-secret", PLACE)]  # it opens the registry as a server does
    assert mounted == {reader: [(f"{reader}-secret", PLACE)] for reader in NEEDED if reader != "operator"}
    assert {reader for readers in setup.READERS.values() for reader in readers} == set(NEEDED)
    made = (ROOT / "docker/Dockerfile").read_text()
    assert all(f"{PLACE}/{reader}" in made for reader in NEEDED), "setup's user must own the folders"
