"""Backups and restores: a registry that was lost comes back for those who had it open, whole or not yet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from prefixes.errors import RegistryRestoring, RegistryUnavailable, WrongRegistry
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.registry.transfer import Outcome, open_target
from prefixes.registry.transfer import transfer as run
from prefixes.spec import TaskRef
from tests.support.disk import DATA, VERSIONS
from tests.support.places import Folder, Places
from tests.support.transfers import ALL, assert_same, fill, publish, results


def test_a_backup_brings_a_lost_registry_back_for_those_who_had_it_open(
    places: Places, opened: Callable[..., Store], tmp_path: Path
) -> None:
    """The folder is a registry with the source's id; a handle that found another or none finds its own again."""
    place, backup = places.new("a"), Folder(tmp_path / "backup")
    replica = fill(opened(place))
    kept = opened(backup, registry_id=replica.id)
    assert run(replica, kept, mirror=True).counts()["copied"] == 3
    assert kept.id == replica.id
    tasks = replica.tasks()

    place.wipe()
    with pytest.raises(WrongRegistry):
        replica.check()
    with pytest.raises(RegistryUnavailable):
        replica.publish("default", "new", DATA[0], record={})
    emptied = place.contents()
    assert open_target(place.url, kept.id, dry_run=True) is None
    assert place.contents() == emptied

    target = open_target(place.url, kept.id)
    assert target is not None
    with closing(target):
        assert results(run(kept, target)) == dict.fromkeys(ALL, "copied")
    replica.check()
    assert replica.tasks() == tasks
    assert replica.resolve(TaskRef.parse("e2e@stable")).version == VERSIONS[0]
    assert_same(kept, opened(place, create=False, registry_id=kept.id))
    publish(replica, 2, name="new")


def test_while_it_is_being_restored_nothing_counts_as_deleted(places: Places, opened: Callable[..., Store]) -> None:
    """Else running servers would answer 404 for every task that is not back yet, and forget it."""
    place = places.new("a")
    served = fill(opened(place))
    backup = open_target(places.new("b").url, served.id)
    assert backup is not None
    run(served, backup)
    place.wipe()

    def cut_short(outcome: Outcome, done: int, due: int) -> None:
        assert served.resolve(TaskRef.parse("acme/e2e")).version == VERSIONS[1]  # what is back is served
        for name in ("e2e", "other"):
            with pytest.raises(RegistryRestoring):
                served.resolve(TaskRef("default", name))
            with pytest.raises(RegistryRestoring):
                served.promote("default", name, VERSIONS[0])
        with pytest.raises(RegistryRestoring):
            served.promote("acme", "e2e", VERSIONS[0])  # nothing is changed before all is there
        with pytest.raises(RegistryRestoring):
            served.fetch("default", VERSIONS[0])
        with pytest.raises(RegistryRestoring):
            served.check()
        with pytest.raises(RegistryRestoring):
            open_registry(place.url)
        raise KeyboardInterrupt

    with closing(open_target(place.url, served.id) or served) as target, pytest.raises(KeyboardInterrupt):
        run(backup, target, progress=cut_short)
    with pytest.raises(RegistryRestoring):
        open_registry(place.url)
    with pytest.raises(WrongRegistry):
        open_target(place.url, "another")
    with closing(open_target(place.url, served.id) or served) as target:
        assert results(run(backup, target))["acme/e2e"] == "unchanged"
    served.check()
    assert_same(served, backup)
    assert opened(place).id == served.id


def test_a_backup_that_was_cut_short_is_none(places: Places, opened: Callable[..., Store]) -> None:
    source, place = fill(opened(places.new("a"))), places.new("b")

    def cut_short(outcome: Outcome, done: int, due: int) -> None:
        raise KeyboardInterrupt

    with closing(open_target(place.url, source.id) or source) as backup, pytest.raises(KeyboardInterrupt):
        run(source, backup, progress=cut_short)
    with pytest.raises(RegistryRestoring):
        open_registry(place.url, create=False)


def test_another_registry_is_not_restored_into_unless_asked(places: Places, opened: Callable[..., Store]) -> None:
    place = places.new("b")
    source, other = fill(opened(places.new("a"))), opened(place)
    before = place.contents()
    for dry_run in (True, False):
        with pytest.raises(WrongRegistry, match=f"expected {source.id} or an empty place, got {other.id}") as caught:
            open_target(place.url, source.id, dry_run=dry_run)
        assert caught.value.detail == {"expected": source.id, "got": other.id}
    assert place.contents() == before
    target = open_target(place.url, source.id, into_other=True)
    assert target is not None
    with closing(target):
        assert target.id == other.id
        run(source, target)
    assert_same(source, other)


def test_a_place_that_holds_something_else_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for dry_run in (True, False):
        with pytest.raises(RegistryUnavailable, match=r"found thesis\.tex"):
            open_target(str(tmp_path), "0" * 32, dry_run=dry_run)


def test_a_backup_follows_its_source(places: Places, opened: Callable[..., Store], tmp_path: Path) -> None:
    source = fill(opened(places.new("a")))
    kept = opened(Folder(tmp_path / "backup"), registry_id=source.id)
    run(source, kept, mirror=True)
    source.promote("default", "e2e", VERSIONS[2])
    source.delete("default", "other")
    publish(source, 2, name="new")
    report = run(source, kept, mirror=True)
    assert results(report) == {
        "acme/e2e": "unchanged", "default/e2e": "replaced", "default/new": "copied", "default/other": "removed",
    }  # fmt: skip
    assert_same(source, kept)
    assert report.deleted == 2
    assert kept.undelete("default", "other").aliases == {"production": VERSIONS[0]}
    assert results(run(source, kept, tenant="acme", mirror=True)) == {"acme/e2e": "unchanged"}
    assert kept.inspect("default", "other")  # another tenant's tasks are none of this one's surplus
