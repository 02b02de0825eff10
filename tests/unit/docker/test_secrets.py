"""Each service reads its own passwords and no others: what ``setup`` writes, and what compose mounts."""

from __future__ import annotations

import importlib.util
import stat
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from tests.support.paths import ROOT

SERVICES: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PLACE: Final = "/run/prefixd/secrets"
NEEDED: Final = {
    "redis": {"redis_password"}, "server": {"redis_password"}, "trainer": {"redis_password"},
    "grafana": {"grafana_password"},
}  # fmt: skip


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
    values = {(folder / reader / "redis_password").read_text() for reader in ("redis", "server", "trainer")}
    assert len(values) == 1 and len(values.pop()) > 30
    modes = {reader: stat.S_IMODE(next((folder / reader).iterdir()).stat().st_mode) for reader in NEEDED}
    assert modes == {"redis": 0o444, "server": 0o400, "trainer": 0o400, "grafana": 0o444}


def test_passwords_stay_and_one_that_is_given_reaches_all_its_readers(
    setup: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.main(folder, tmp_path)
    before = {path: path.read_text() for path in folder.rglob("*_password")}
    setup.main(folder, tmp_path)
    assert {path: path.read_text() for path in folder.rglob("*_password")} == before
    (folder / "trainer" / "redis_password").unlink()  # a reader that is new
    setup.main(folder, tmp_path)
    assert {path: path.read_text() for path in folder.rglob("*_password")} == before
    (tmp_path / "redis_password").write_text("of-mine\n")
    setup.main(folder, tmp_path)
    told = {path.parent.name: path.read_text() for path in folder.rglob("redis_password")}
    assert told == {"redis": "of-mine", "server": "of-mine", "trainer": "of-mine"}
    printed = capsys.readouterr().out
    assert "redis_password: taken from the compose secret" in printed and "of-mine" not in printed


def test_compose_mounts_to_each_service_its_own_secrets(setup: ModuleType) -> None:
    mounted: dict[str, list[tuple[str, str]]] = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            if target.startswith(PLACE):
                mounted.setdefault(name, []).append((source, target))
    assert sorted(mounted.pop("setup")) == sorted((f"{reader}-secret", f"{PLACE}/{reader}") for reader in NEEDED)
    assert mounted == {reader: [(f"{reader}-secret", PLACE)] for reader in NEEDED}
    assert {reader for readers in setup.READERS.values() for reader in readers} == set(NEEDED)
    made = (ROOT / "docker/Dockerfile").read_text()
    assert all(f"{PLACE}/{reader}" in made for reader in NEEDED), "setup's user must own the folders"
