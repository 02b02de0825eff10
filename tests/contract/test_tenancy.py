"""What every store promises of tenants, keys and shares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from prefixes.errors import Conflict, InvalidName, RegistryUnavailable
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.tenancy import changes
from prefixes.tenancy.directory import Directory, later, utc_now
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.limits import MAX_LIMIT, Limits
from prefixes.tenancy.model import InvalidKey, Key, KeyNotFound, Scope, Share
from prefixes.tenancy.secret import new_id, new_secret, parse_secret


@pytest.fixture
def directory(registry: Store) -> Directory:
    return Directory(registry.tenancy)


@pytest.fixture
def keyring(registry: Store) -> Iterator[Keyring]:
    ring = Keyring(registry.tenancy, max_stale_s=60)
    yield ring
    ring.close()


def works(keyring: Keyring, secret: str) -> bool:
    """Whether a key is behind the secret, as the registry has it now."""
    presented = parse_secret(secret)
    assert presented is not None
    keyring.look()
    return keyring.find(presented) is not None


def test_a_new_registry_is_open_and_its_first_key_closes_it_for_good(url: str, directory: Directory) -> None:
    directory.create_tenant("acme", actor="ops")
    directory.share("acme/e2e", Share(everyone=True), actor="ops")
    assert not directory.closed
    key = directory.create_key("acme", "ci", ["generate"], actor="ops").key
    assert directory.closed
    directory.revoke(key.id, actor="ops")
    with closing(open_registry(url)) as again:
        assert Directory(again.tenancy).closed


def test_closed_survives_a_restore(url: str, registry: Store, directory: Directory) -> None:
    directory.create_key("acme", "ci", ["generate"], actor="ops")
    with closing(open_registry(url, registry_id=registry.id, restoring=True)) as restored:
        restored.begin_restoring()
        with pytest.raises(RegistryUnavailable):
            directory.load()
        restored.finish_restoring()
    assert directory.closed and len(directory.load().keys) == 1


def test_a_key_works_until_it_is_revoked(directory: Directory, keyring: Keyring) -> None:
    made = directory.create_key("acme", "ci", ["generate", "publish"], actor="ops")
    assert works(keyring, made.secret)
    state = directory.load()
    assert state.tenants["acme"].created_by == made.key.created_by == "ops"
    assert state.keys[made.key.id] == made.key and made.key.scopes == {Scope.GENERATE, Scope.PUBLISH}
    revoked = directory.revoke(made.key.id, actor="boss")
    assert not works(keyring, made.secret)
    assert directory.revoke(made.key.id, actor="boss") == revoked
    assert [(change.action, change.actor) for change in directory.load().changes] == [
        ("tenant-create", "ops"), ("key-create", "ops"), ("key-revoke", "boss")
    ]  # fmt: skip


def test_nothing_that_is_kept_tells_a_secret(registry: Store, directory: Directory) -> None:
    made = directory.create_key("acme", "ci", ["generate"], actor="ops")
    again = directory.rotate(made.key.id, actor="ops")
    kept = registry.tenancy.read().data
    assert kept is not None
    for secret in (made.secret, again.secret):
        assert secret.encode() not in kept and secret[16:].encode() not in kept
        assert secret not in repr(made) + repr(again) and secret[16:] not in repr(parse_secret(secret))


def test_a_foreign_secret_with_a_known_id_is_refused(directory: Directory, keyring: Keyring) -> None:
    made = directory.create_key("acme", "ci", ["generate"], actor="ops")
    assert not works(keyring, new_secret(made.key.id))
    assert not works(keyring, new_secret(new_id()))


def test_a_rotated_key_keeps_its_id_and_its_old_secret_for_the_grace_period(
    directory: Directory, keyring: Keyring
) -> None:
    made = directory.create_key("acme", "ci", ["generate"], actor="ops")
    second = directory.rotate(made.key.id, grace_s=600, actor="ops")
    assert second.key.id == made.key.id and second.key.scopes == made.key.scopes
    assert works(keyring, made.secret) and works(keyring, second.secret)
    third = directory.rotate(made.key.id, grace_s=600, actor="ops")
    assert [works(keyring, one.secret) for one in (made, second, third)] == [False, True, True]
    fourth = directory.rotate(made.key.id, grace_s=0, actor="ops")
    assert [works(keyring, one.secret) for one in (second, third, fourth)] == [False, False, True]


def test_an_expired_key_is_refused_without_a_look(directory: Directory, keyring: Keyring) -> None:
    soon = later(utc_now(), 0.3)
    made = directory.create_key("acme", "ci", ["generate"], expires_at=soon, actor="ops")
    presented = parse_secret(made.secret)
    assert presented is not None
    keyring.look()
    while utc_now() < soon:
        pass
    assert keyring.find(presented) is None
    with pytest.raises(Conflict):
        directory.rotate(made.key.id, actor="ops")


def test_a_secret_made_elsewhere_is_taken_once_and_never_again(directory: Directory, keyring: Keyring) -> None:
    secret = new_secret(new_id())
    presented = parse_secret(secret)
    assert presented is not None

    def adopt() -> Key:
        return directory.adopt(
            presented.key_id, presented.digest, "default", "operator", ["operator"], actor="setup"
        )

    key = adopt()
    assert adopt() == key and works(keyring, secret)
    directory.revoke(key.id, actor="ops")
    adopt()
    assert not works(keyring, secret)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"scopes": ["genrate"]}, InvalidKey), ({"scopes": []}, InvalidKey), ({"name": ""}, InvalidKey),
        ({"name": "x" * 101}, InvalidKey), ({"name": "a\nb"}, InvalidKey), ({"tenant": "../x"}, InvalidName),
        ({"expires_at": "2020-01-01T00:00:00.000Z"}, InvalidKey),
    ],
)  # fmt: skip
def test_a_bad_key_is_refused_and_leaves_the_registry_open(
    directory: Directory, given: dict[str, object], error: type[Exception]
) -> None:
    values = {"tenant": "acme", "name": "ci", "scopes": ["generate"], "actor": "ops", **given}
    with pytest.raises(error):
        directory.create_key(**values)  # type: ignore[arg-type]
    assert not directory.closed and directory.load().keys == {}


def test_unknown_keys_tenants_and_foreign_keys_are_not_found(directory: Directory) -> None:
    made = directory.create_key("acme", "ci", ["generate"], actor="ops")
    with pytest.raises(KeyNotFound):
        directory.revoke(new_id(), actor="ops")
    with pytest.raises(KeyNotFound):
        directory.revoke(made.key.id, actor="ops", tenant="other")
    with pytest.raises(KeyNotFound):
        directory.block("other", True, actor="ops")


def test_limits_are_kept_with_their_history(directory: Directory) -> None:
    made = directory.create_key("acme", "ci", ["read"], limits={"num_beams": 2}, actor="ops")
    directory.limit_tenant("acme", {"requests_per_minute": 60, "num_beams": 1}, weight=2, actor="ops")
    directory.limit_tenant("acme", {"num_beams": None}, actor="ops")
    directory.limit_key(made.key.id, {"open_jobs": 0, "num_beams": None}, actor="acme-key", tenant="acme")
    state = directory.load()
    assert (state.tenants["acme"].limits, state.tenants["acme"].weight) == (Limits(requests_per_minute=60), 2)
    assert state.keys[made.key.id].limits == Limits(open_jobs=0)
    assert [(change.action, change.detail) for change in state.changes[1:]] == [
        ("key-create", "read, num_beams 2"),
        ("tenant-limits", "weight 2, requests_per_minute 60, num_beams 1"),
        ("tenant-limits", "num_beams unset"),
        ("key-limits", "num_beams unset, open_jobs 0"),
    ]
    directory.limit_tenant("acme", {"requests_per_minute": 60}, weight=2, actor="ops")
    assert directory.load() == state  # the same again is no change
    rotated = directory.rotate(made.key.id, actor="ops")
    assert rotated.key.limits == Limits(open_jobs=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_beams": -1}, "num_beams: expected a whole number from 0 to 1000000000000000, or nothing; got -1"),
        ({"num_beams": MAX_LIMIT + 1}, "got 1000000000000001"),
        ({"num_beams": True}, "got True"),
        ({"requests": 1}, "expected some of requests_per_minute, .*; got requests"),
    ],
)
def test_limits_that_are_none_change_nothing(directory: Directory, given: dict[str, int | None], told: str) -> None:
    made = directory.create_key("acme", "ci", ["read"], actor="ops")
    before = directory.load()
    for change in (
        lambda: directory.limit_tenant("acme", {"open_jobs": 1, **given}, weight=2, actor="ops"),
        lambda: directory.limit_key(made.key.id, {"open_jobs": 1, **given}, actor="ops"),
        lambda: directory.create_key("acme", "more", ["read"], limits=given, actor="ops"),
    ):
        with pytest.raises(InvalidKey, match=told):
            change()
    assert directory.load() == before


def test_a_key_of_another_tenant_is_not_limited(directory: Directory) -> None:
    made = directory.create_key("acme", "ci", ["read"], actor="ops")
    with pytest.raises(KeyNotFound):
        directory.limit_key(made.key.id, {"num_beams": 1}, actor="globex-key", tenant="globex")
    with pytest.raises(KeyNotFound):
        directory.limit_tenant("nobody", {"num_beams": 1}, actor="ops")


def test_shares_are_kept_with_their_history(directory: Directory) -> None:
    share = Share(tenants=frozenset({"globex"}), download=True)
    assert directory.share("acme/e2e", share, actor="acme-key") == share
    assert directory.load().shares == {"acme/e2e": share}
    assert directory.share("acme/e2e", Share(download=True), actor="acme-key") == Share()
    assert directory.load().shares == {}
    assert [change.action for change in directory.load().changes] == ["share", "unshare"]


def test_writers_at_the_same_time_lose_nothing(url: str, directory: Directory) -> None:
    def make(number: int) -> str:
        with closing(open_registry(url)) as own:
            made = Directory(own.tenancy).create_key(f"tenant-{number % 3}", f"key {number}", ["read"], actor="x")
            return made.key.id

    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(make, range(12)))
    assert directory.load().keys.keys() == ids and len(ids) == 12
    assert len(directory.load().tenants) == 3


def test_when_keys_were_used_is_noted_and_never_goes_back(registry: Store, directory: Directory) -> None:
    registry.tenancy.note_used({"a": "2026-01-02T00:00:00.000Z", "b": "2026-01-02T00:00:00.000Z"})
    registry.tenancy.note_used({"a": "2026-01-01T00:00:00.000Z", "b": "2026-01-03T00:00:00.000Z"})
    assert directory.used() == {"a": "2026-01-02T00:00:00.000Z", "b": "2026-01-03T00:00:00.000Z"}


def test_when_a_forgotten_key_was_used_is_forgotten_too(
    registry: Store, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MAX_KEYS_OF_A_TENANT", 2)
    first, second = (directory.create_key("acme", "ci", ["read"], actor="t").key.id for _ in range(2))
    registry.tenancy.note_used({first: "2030-01-01T00:00:00.000Z", second: "2030-01-01T00:01:00.000Z"})
    directory.revoke(first, actor="t")
    directory.create_key("acme", "ci", ["read"], actor="t")
    assert first not in directory.load().keys
    assert directory.used() == {second: "2030-01-01T00:01:00.000Z"}


def test_a_keyring_notes_what_it_found(registry: Store, directory: Directory) -> None:
    made, ring = directory.create_key("acme", "ci", ["read"], actor="ops"), Keyring(registry.tenancy, 60)
    assert works(ring, made.secret)
    ring.close()
    used = directory.used()
    assert used.keys() == {made.key.id} and used[made.key.id].endswith(":00.000Z")


def test_a_damaged_document_is_an_outage_and_no_open_door(registry: Store, directory: Directory) -> None:
    made = directory.create_key("acme", "ci", ["read"], actor="ops")
    stored = registry.tenancy.read()
    assert stored.data is not None
    raw = json.loads(stored.data)
    raw["keys"][made.key.id]["surprise"] = 1
    assert registry.tenancy.replace(json.dumps(raw).encode(), stored.revision)
    with pytest.raises(RegistryUnavailable, match="surprise"):
        directory.load()
    with pytest.raises(RegistryUnavailable):
        Keyring(registry.tenancy, 60)


def test_one_tenants_changes_push_out_no_others(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that rotates its keys for ever left no trace of what was done to the others'."""
    monkeypatch.setattr(changes, "CHANGES_KEPT", 20)
    quiet = directory.create_key("acme", "ci", ["read"], actor="acme")
    busy = directory.create_key("globex", "ci", ["read"], actor="globex")
    directory.revoke(quiet.key.id, actor="acme")
    for number in range(40):
        directory.rotate(busy.key.id, grace_s=0, actor=f"globex-{number}")
    kept = directory.load().changes
    assert len(kept) == 20
    assert [change.action for change in kept if change.tenant == "acme"] == [
        "tenant-create", "key-create", "key-revoke"
    ]  # fmt: skip
    assert [change.actor for change in kept if change.tenant == "globex"] == [f"globex-{n}" for n in range(23, 40)]
