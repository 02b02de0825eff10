"""The keyring's thread goes on looking, whatever goes wrong, and what it knows is too old at some time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.registry import open_registry
from prefixes.tenancy import keyring
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.secret import parse_secret
from tests.support.clock import Ahead

PATIENCE_S = 20


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "LOOK_S", 0.01)
    monkeypatch.setattr(keyring, "NOTE_S", 0.0)


@pytest.mark.parametrize("error", [OSError(28, "no space"), RuntimeError("dictionary changed size")])
def test_a_note_that_fails_does_not_end_the_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Without them no revocation would be seen any more, and soon no key would work."""
    store = open_registry(str(tmp_path / "registry")).tenancy
    directory, ring = Directory(store), Keyring(store, 60)
    failed = []

    def fails(times: Mapping[str, str]) -> None:
        failed.append(times)
        raise error

    monkeypatch.setattr(store, "note_used", fails)
    made = directory.create_key("acme", "x", ["read"], actor="t")
    presented = parse_secret(made.secret)
    assert presented is not None
    ring.start()
    wait_for(lambda: ring.find(presented) is not None)
    wait_for(lambda: bool(failed))
    directory.revoke(made.key.id, actor="t")
    wait_for(lambda: ring.find(presented) is None)
    ring.close()


def test_what_could_not_be_noted_is_noted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that was used while the registry was away looked as if nobody needed it."""
    store = open_registry(str(tmp_path / "registry")).tenancy
    made = Directory(store).create_key("acme", "x", ["read"], actor="t")
    ring, presented = Keyring(store, 60), parse_secret(made.secret)
    assert presented is not None and ring.find(presented) is not None

    def fails(times: Mapping[str, str]) -> None:
        raise RegistryUnavailable("away")

    with monkeypatch.context() as away:
        away.setattr(store, "note_used", fails)
        ring.close()
    assert store.used() == {}
    ring.close()
    assert list(store.used()) == [made.key.id]


def test_a_service_that_needed_keys_goes_on_needing_them(tmp_path: Path) -> None:
    """An older copy of the registry, of a time before its first key, opened services that listen to the world."""
    registry = open_registry(str(tmp_path / "registry"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("registry.json")}
    Directory(registry.tenancy).create_key("acme", "x", ["read"], actor="t")
    ring = Keyring(registry.tenancy, 60)
    assert ring.closed
    (tmp_path / "registry" / "tenancy.json").unlink()
    for path, data in before.items():
        path.write_bytes(data)
    ring.look()
    assert not ring.known.tenancy.keys
    assert ring.closed
    assert not Keyring(registry.tenancy, 60).closed


@pytest.mark.parametrize("max_stale_s", [0, 60])
def test_keys_can_be_judged_until_the_registry_was_away_for_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_stale_s: int
) -> None:
    """With 0 no key ever worked, and no service with keys started: some time always passes after a look."""
    registry, away, clock = tmp_path / "registry", tmp_path / "away", Ahead()
    monkeypatch.setattr(keyring, "time", clock)
    store = open_registry(str(registry)).tenancy
    made = Directory(store).create_key("acme", "x", ["metrics"], actor="t")
    ring, presented = Keyring(store, max_stale_s), parse_secret(made.secret)
    assert presented is not None and ring.find(presented) is not None
    ring.check()
    registry.rename(away)
    ring.look()
    if max_stale_s:
        clock.seconds = max_stale_s - 30
        assert ring.find(presented) is not None
        ring.check()
    clock.seconds = max_stale_s + 1
    for refused in (lambda: ring.find(presented), ring.check):
        with pytest.raises(RegistryUnavailable, match=f"away for more than {max_stale_s} s"):
            refused()
    assert ring.find(presented, ring.last_known) is not None
    away.rename(registry)
    ring.look()
    ring.check()
    assert ring.find(presented) is not None


def test_where_nobody_needs_a_key_no_outage_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ahead()
    monkeypatch.setattr(keyring, "time", clock)
    ring = Keyring(open_registry(str(tmp_path / "registry")).tenancy, 60)
    (tmp_path / "registry").rename(tmp_path / "away")
    ring.look()
    clock.seconds = 86400
    ring.check()
