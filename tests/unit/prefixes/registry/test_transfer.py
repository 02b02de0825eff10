"""Copies between registries: every task goes over whole or not at all, from and to either store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import TaskNotFound
from prefixes.registry import open_registry, transfer
from prefixes.registry.base import Store
from prefixes.registry.disk.registry import DiskRegistry
from prefixes.registry.transfer import Outcome, open_target
from prefixes.registry.transfer import transfer as run
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.model import Share
from tests.support.disk import DATA, VERSIONS, blob
from tests.support.places import Folder, Places
from tests.support.redis_server import RedisServer
from tests.support.transfers import ALL, assert_same, fill, publish, results


def test_everything_goes_over_with_its_past(places: Places, opened: Callable[..., Store]) -> None:
    source, target = fill(opened(places.new("a"))), opened(places.new("b"))
    told: list[tuple[Outcome, int, int]] = []
    report = run(source, target, actor="me", progress=lambda *step: told.append(step))
    assert results(report) == dict.fromkeys(ALL, "copied")
    assert (report.bad, report.deleted, report.dry_run) == (0, 1, False)
    assert told == [(outcome, done, 3) for done, outcome in enumerate(report.outcomes, 1)]
    assert [(outcome.versions, outcome.size) for outcome in report.outcomes] == [
        (1, len(DATA[1])), (3, sum(map(len, DATA))), (1, len(DATA[0])),
    ]  # fmt: skip
    assert_same(source, target)
    assert [(entry.actor, entry.action, entry.new) for entry in target.audit("acme")] == [("me", "copy", VERSIONS[1])]
    assert target.deleted() == []
    assert source.id != target.id
    assert target.rollback("default", "e2e").aliases["production"] == VERSIONS[0]  # the past is of use


def test_a_publish_is_not_repeated_in_a_copy_that_has_its_key(
    places: Places, opened: Callable[..., Store]
) -> None:
    source, target = opened(places.new("a")), opened(places.new("b"))
    first = source.publish("default", "e2e", DATA[0], record={}, idempotency_key="job-1")
    publish(source, 1)
    run(source, target)
    assert target.publish("default", "e2e", DATA[0], record={"late": True}, idempotency_key="job-1") == first
    assert_same(source, target)


def test_what_is_there_already_is_left_alone(places: Places, opened: Callable[..., Store]) -> None:
    place = places.new("b")
    source, target = fill(opened(places.new("a"))), opened(place)
    run(source, target)
    before = place.contents()
    assert results(run(source, target, replace=True)) == dict.fromkeys(ALL, "unchanged")
    assert place.contents() == before


def test_one_tenant_or_one_task(places: Places, opened: Callable[..., Store]) -> None:
    source, target = fill(opened(places.new("a"))), opened(places.new("b"))
    report = run(source, target, tenant="acme")
    assert (results(report), report.deleted) == ({"acme/e2e": "copied"}, 0)
    report = run(source, target, tenant="default", name="other")
    assert (results(report), report.deleted) == ({"default/other": "copied"}, 0)
    assert [f"{task.tenant}/{task.name}" for task in target.tasks()] == ["acme/e2e", "default/other"]
    with pytest.raises(TaskNotFound):
        run(source, target, tenant="default", name="gone")


def test_another_task_of_that_name_is_a_conflict_or_replaced_and_can_be_brought_back(
    places: Places, opened: Callable[..., Store]
) -> None:
    source, target = fill(opened(places.new("a"))), opened(places.new("b"))
    publish(target, 2, name="other")
    theirs = target.inspect("default", "other")
    report = run(source, target)
    assert results(report) == {"acme/e2e": "copied", "default/e2e": "copied", "default/other": "conflict"}
    assert report.bad == 1
    assert target.inspect("default", "other") == theirs
    report = run(source, target, replace=True)
    assert results(report) == {"acme/e2e": "unchanged", "default/e2e": "unchanged", "default/other": "replaced"}
    assert_same(source, target)
    target.delete("default", "other")
    target.undelete("default", "other")
    assert target.inspect("default", "other") == source.inspect("default", "other")
    assert [item.task for item in target.deleted()] == [theirs]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_dry_run_tells_all_and_writes_nothing(
    places: Places, opened: Callable[..., Store], tmp_path: Path, dry_run: bool
) -> None:
    """The same outcomes, with and without: conflicts, bad artifacts and what would be removed among them."""
    from_disk = Folder(tmp_path / "source")
    to, nowhere = places.new("b"), places.new("c")
    source, target = fill(opened(from_disk)), opened(to)
    publish(target, 2, name="other")
    publish(target, 2, name="surplus")
    (from_disk.path / blob(1, "acme")).write_bytes(b"rot")
    before = (from_disk.contents(), to.contents(), nowhere.contents())
    report = run(source, target, mirror=True, dry_run=dry_run)
    assert results(report) == {
        "acme/e2e": "failed", "default/e2e": "copied", "default/other": "replaced", "default/surplus": "removed",
    }  # fmt: skip
    assert run(source, None, dry_run=True).counts()["copied"] == 2
    assert open_target(nowhere.url, source.id, dry_run=True) is None
    after = (from_disk.contents(), to.contents(), nowhere.contents())
    assert (after == before) == dry_run
    assert (after[0], after[2]) == (before[0], before[2])


def test_a_task_larger_than_what_is_cached_is_read_twice_and_is_whole(
    places: Places, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = fill(opened(places.new("a"))), opened(places.new("b"))
    fetched: list[str] = []
    real = source.fetch

    def fetch(tenant: str, version: str) -> bytes:
        fetched.append(version)
        return real(tenant, version)

    monkeypatch.setattr(source, "fetch", fetch)
    run(source, target, tenant="default", name="e2e")
    assert sorted(fetched) == sorted(VERSIONS)
    fetched.clear()
    monkeypatch.setattr(transfer, "MAX_CACHED_BYTES", len(DATA[0]))
    run(source, opened(places.new("c")), tenant="default", name="e2e")
    assert len(fetched) == 5
    assert target.inspect("default", "e2e") == source.inspect("default", "e2e")


def test_once_a_registry_is_gone_no_more_is_tried(tmp_path: Path) -> None:
    with RedisServer() as server, closing(open_registry(server.url)) as source:
        for number in range(20):
            publish(source, 0, name=f"task-{number:02}")
        target = DiskRegistry(tmp_path / "b")

        def end(outcome: Outcome, done: int, total: int) -> None:
            if done == 3:
                server.kill()

        report = run(source, target, progress=end)
    assert [outcome.result for outcome in report.outcomes] == ["copied"] * 3 + ["failed"] * 17
    errors = [outcome.error or "" for outcome in report.outcomes]
    assert not errors[3].startswith("not tried")
    assert all(error.startswith("not tried: registry: Redis") for error in errors[4:])
    assert len(target.tasks()) == 3


def test_a_task_needs_its_tenant_and_a_real_run_its_target(tmp_path: Path) -> None:
    source: Any = DiskRegistry(tmp_path / "a")
    with pytest.raises(ValueError, match="expected a tenant"):
        run(source, source, name="e2e")
    with pytest.raises(ValueError, match="expected a target"):
        run(source, None)


def test_keys_go_into_a_backup_and_back_and_a_restore_undoes_no_revocation(places: Places, tmp_path: Path) -> None:
    """A restored registry is closed before it holds a task, and a key that was revoked since the backup stays so."""
    backup = str(tmp_path / "keys-backup")
    with closing(open_registry(places.new("a").url)) as source:
        directory = Directory(source.tenancy)
        kept, revoked = (directory.create_key("acme", name, ["read"], actor="t").key for name in ("kept", "revoked"))
        with closing(open_registry(backup, registry_id=source.id)) as target:
            assert run(source, target, mirror=True, dry_run=True).keys
            assert not Directory(target.tenancy).closed
            assert run(source, target, mirror=True).keys and not run(source, target, mirror=True).keys
            assert Directory(target.tenancy).load() == directory.load() and Directory(target.tenancy).closed
            directory.revoke(revoked.id, actor="t")
            assert not run(target, source).keys
            assert directory.load().keys[revoked.id].revoked_at
            with closing(open_registry(str(tmp_path / "other"))) as other:
                assert not run(source, other).keys and not Directory(other.tenancy).closed
            anew = open_target(places.new("b").url, source.id)
            assert anew is not None
            with closing(anew):
                assert run(target, anew).keys
                assert Directory(anew.tenancy).closed
                assert Directory(anew.tenancy).load().keys.keys() == {kept.id, revoked.id}


def test_a_restore_closes_what_was_closed_whatever_is_there(places: Places, tmp_path: Path) -> None:
    """A share or a tenant made before any key left an older state of the same registry open, with all its tasks."""
    with closing(open_registry(places.new("a").url)) as source:
        Directory(source.tenancy).create_key("acme", "x", ["read"], actor="t")
        with closing(open_registry(str(tmp_path / "older"), registry_id=source.id)) as older:
            Directory(older.tenancy).share("acme/e2e", Share(everyone=True), actor="t")
            assert run(source, older).keys
            assert Directory(older.tenancy).closed
            assert Directory(older.tenancy).load() == Directory(source.tenancy).load()


def test_a_closed_registry_without_its_keys_is_closed_in_its_backup(tmp_path: Path) -> None:
    """So a crash leaves one that dies between closing and its first key."""
    with closing(open_registry(str(tmp_path / "a"))) as source:
        Directory(source.tenancy).create_key("acme", "x", ["read"], actor="t")
        (tmp_path / "a" / "tenancy.json").unlink()
        backup = open_target(str(tmp_path / "backup"), source.id)
        assert backup is not None
        with closing(backup):
            assert run(source, backup, mirror=True).keys and not run(source, backup, mirror=True).keys
            assert Directory(backup.tenancy).closed
            assert not Directory(backup.tenancy).load().keys
