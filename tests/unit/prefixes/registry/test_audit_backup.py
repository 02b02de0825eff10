"""The audit goes into backups and comes back with a restore: of tasks, of keys, and of who was refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from prefixes.registry.base import Store
from prefixes.registry.transfer import Outcome, Progress, Report, open_target
from prefixes.registry.transfer import transfer as run
from prefixes.tenancy.denial import Denial
from prefixes.tenancy.directory import Directory
from tests.support.places import Folder, Places
from tests.support.transfers import fill, publish

DENIALS = [
    Denial(f"2026-01-01T00:00:0{n}.000Z", "K", "generate", "POST /generate", "", "no", f"r{n}") for n in range(4)
]


def audited(registry: Store) -> list[object]:
    """All of the audit."""
    tenancy = registry.tenancy
    return [
        {tenant: registry.audit(tenant, limit=1000) for tenant in ("default", "acme", "gone")},
        Directory(tenancy).load().changes,
        [tenancy.denials(caller) for caller in (None, "default", "acme")],
    ]


def prepare(registry: Store) -> Store:
    """Tasks with a past, one tenant that has deleted its last, keys, and denials."""
    fill(registry)
    publish(registry, 0, tenant="gone")
    registry.delete("gone", "e2e", actor="ci")
    for tenant in ("default", "acme"):
        Directory(registry.tenancy).create_key(tenant, "ci", ["read"], actor="ops")
    registry.tenancy.note_denials("acme", DENIALS[:2])
    registry.tenancy.note_denials(None, DENIALS[2:3])
    return registry


def restore(backup: Store, url: str, progress: Progress | None = None) -> Report:
    """As the command does it."""
    target = open_target(url, backup.id)
    assert target is not None
    with closing(target):
        return run(backup, target, progress=progress)


def test_a_backup_has_the_audit_as_it_is_and_a_restore_brings_it_back(
    places: Places, opened: Callable[..., Store], tmp_path: Path
) -> None:
    """It was left out: with the registry it was lost for good."""
    place, backup = places.new("a"), Folder(tmp_path / "backup")
    registry = prepare(opened(place))
    kept = opened(backup, registry_id=registry.id)
    assert run(registry, kept, mirror=True).bad == 0
    assert audited(kept) == audited(registry), "no entry is of the backup's own making"

    registry.rollback("default", "e2e", actor="later")
    registry.delete("default", "other", actor="later")
    registry.tenancy.note_denials("acme", DENIALS[3:])
    assert run(registry, kept, mirror=True).bad == 0
    before = audited(registry)
    assert audited(kept) == before, "the second backup too, which deletes"

    place.wipe()
    assert restore(kept, place.url).bad == 0
    restored = opened(place, create=False, registry_id=kept.id)
    entries, changes, denials = before
    found = audited(restored)
    assert found[1:] == [changes, denials]
    for tenant, told in found[0].items():  # type: ignore[attr-defined]
        own = len(restored.tasks(tenant))  # the restore's, behind them
        assert told[own:] == entries[tenant], tenant  # type: ignore[index]
        assert [entry.action for entry in told[:own]] == ["copy"] * own


def test_a_restore_leaves_an_audit_that_is_there(
    places: Places, opened: Callable[..., Store], tmp_path: Path
) -> None:
    """It may be newer than the backup's."""
    place, backup = places.new("a"), Folder(tmp_path / "backup")
    registry = prepare(opened(place))
    kept = opened(backup, registry_id=registry.id)
    run(registry, kept, mirror=True)
    registry.rollback("default", "e2e", actor="later")
    registry.tenancy.note_denials("acme", DENIALS[3:])
    before = audited(registry)
    restore(kept, place.url)
    assert audited(registry) == before


def test_a_copy_to_another_registry_tells_nothing_of_the_one_it_is_from(
    places: Places, opened: Callable[..., Store]
) -> None:
    registry, other = prepare(opened(places.new("a"))), opened(places.new("b"))
    assert run(registry, other, mirror=True).bad == 0
    assert [entry.action for entry in other.audit("acme")] == ["copy"]
    assert other.tenancy.denials("acme") == [] and other.audit("gone") == []
    run(registry, other, tenant="acme")
    assert len(other.audit("acme")) == 1


def test_a_dry_run_writes_no_audit(places: Places, opened: Callable[..., Store], tmp_path: Path) -> None:
    registry = prepare(opened(places.new("a")))
    kept = opened(Folder(tmp_path / "backup"), registry_id=registry.id)
    run(registry, kept, mirror=True, dry_run=True)
    assert kept.audit("acme") == [] and kept.tenancy.denials("acme") == []


def test_a_restore_that_is_cut_short_brings_the_audit_back_at_the_next_try(
    places: Places, opened: Callable[..., Store], tmp_path: Path
) -> None:
    place, backup = places.new("a"), Folder(tmp_path / "backup")
    registry = prepare(opened(place))
    kept = opened(backup, registry_id=registry.id)
    run(registry, kept, mirror=True)
    before = registry.audit("default", limit=1000)
    place.wipe()

    def cut(outcome: Outcome, done: int, due: int) -> None:
        if done == due - 1:
            raise KeyboardInterrupt

    for progress in (cut, cut, None):
        with suppress(KeyboardInterrupt):
            restore(kept, place.url, progress)
    restored = opened(place, create=False, registry_id=kept.id)
    found = restored.audit("default", limit=1000)
    assert found[-len(before) :] == before
    assert [entry.action for entry in found[: -len(before)]] == ["copy"] * 2
    assert restored.tenancy.denials("acme") == DENIALS[1::-1]
