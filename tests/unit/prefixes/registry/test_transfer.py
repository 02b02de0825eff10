"""Copies, backups and restores: every task goes over whole or not at all, from and to either store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import InvalidArtifact, RegistryRestoring, RegistryUnavailable, TaskNotFound, WrongRegistry
from prefixes.registry import open_registry, transfer
from prefixes.registry.base import Store
from prefixes.registry.disk.registry import DiskRegistry
from prefixes.registry.failed_tenants import FailedTenants
from prefixes.registry.transfer import Outcome, Report, open_target
from prefixes.registry.transfer import transfer as run
from prefixes.spec import TaskRef
from tests.support.disk import DATA, VERSIONS, blob
from tests.support.places import Folder, Places, redis_server
from tests.support.redis_server import RedisServer


@pytest.fixture(params=["disk", "redis"], scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer | None]:
    with redis_server(request.param) as found:
        yield found


@pytest.fixture
def places(server: RedisServer | None, tmp_path: Path) -> Places:
    return Places(tmp_path, server)


@pytest.fixture
def opened() -> Iterator[Callable[..., Store]]:
    with ExitStack() as stack:
        yield lambda place, **options: stack.enter_context(closing(open_registry(place.url, **options)))


def publish(registry: Store, *indices: int, tenant: str = "default", name: str = "e2e") -> None:
    for index in indices:
        registry.publish(tenant, name, DATA[index], record={"number": index}, actor="ci")


def fill(registry: Store) -> Store:
    """Three tasks of two tenants, one with a past, and a deleted one."""
    publish(registry, 0, 1, 2)
    registry.promote("default", "e2e", VERSIONS[0], alias="stable")
    registry.rollback("default", "e2e")
    publish(registry, 0, name="other")
    publish(registry, 1, tenant="acme")
    publish(registry, 2, name="gone")
    registry.delete("default", "gone")
    return registry


def results(report: Report) -> dict[str, str]:
    return {outcome.task: outcome.result for outcome in report.outcomes}


def assert_same(left: Store, right: Store) -> None:
    """The same tasks, times and records included, and the same artifacts."""
    assert left.tasks() == right.tasks()
    for task in left.tasks():
        for info in task.versions:
            assert left.fetch(task.tenant, info.version) == right.fetch(task.tenant, info.version)


ALL = ["acme/e2e", "default/e2e", "default/other"]


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


@pytest.mark.parametrize("damage", ["rot", "another", "missing"])
def test_a_bad_artifact_keeps_its_task_back_and_no_other(
    places: Places, opened: Callable[..., Store], tmp_path: Path, damage: str
) -> None:
    """Nothing of the task arrives, its good versions neither."""
    from_disk = Folder(tmp_path / "source")
    source, target = fill(opened(from_disk)), opened(places.new("b"))
    path = from_disk.path / blob(0)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"rot" if damage == "rot" else DATA[1])
    report = run(source, target)
    assert results(report) == {"acme/e2e": "copied", "default/e2e": "failed", "default/other": "failed"}
    errors = {outcome.task: outcome.error or "" for outcome in report.outcomes}
    told = {"rot": "expected at least 8 bytes", "another": "digest: expected", "missing": "artifact is missing"}
    assert told[damage] in errors["default/e2e"]
    assert [f"{task.tenant}/{task.name}" for task in target.tasks()] == ["acme/e2e"]
    assert target.gc(retention_s=0).artifacts == ()
    assert target.audit("default") == []


@pytest.mark.parametrize("damaged", ["a task", "a deleted one"])
def test_a_damaged_index_keeps_its_tenant_back_and_no_other(
    places: Places, opened: Callable[..., Store], tmp_path: Path, damaged: str
) -> None:
    """What an older backup has of the tenant stays there."""
    from_disk = Folder(tmp_path / "source")
    source, backup = fill(opened(from_disk)), opened(places.new("b"))
    run(source, backup, mirror=True)
    before = backup.tasks("default")
    publish(source, 2, tenant="acme")
    publish(source, 1, name="new")
    tenant = from_disk.path / "tenants" / "default"
    path = tenant / "tasks" / "other.json" if damaged == "a task" else next((tenant / "deleted").iterdir())
    path.write_text("{")
    report = run(source, backup, mirror=True)
    failed = next(outcome for outcome in report.outcomes if outcome.task == "default/*")
    assert (failed.result, report.bad) == ("failed", 1) and path.name in str(failed.error)
    assert backup.tasks("acme") == source.tasks("acme")
    if damaged == "a task":
        assert backup.tasks("default") == before
    else:
        assert backup.tasks("default") == source.tasks("default")


def test_a_damaged_index_in_an_older_backup_keeps_no_other_task_from_it(
    places: Places, opened: Callable[..., Store], tmp_path: Path
) -> None:
    source, folder = fill(opened(places.new("a"))), Folder(tmp_path / "backup")
    backup = opened(folder)
    run(source, backup, mirror=True)
    publish(source, 2, tenant="acme")
    publish(source, 1, name="new")
    (folder.path / "tenants" / "default" / "tasks" / "other.json").write_text("{")
    report = run(source, backup, mirror=True)
    told = results(report)
    assert (told["acme/e2e"], told["default/new"], told["default/other"]) == ("replaced", "copied", "failed")
    assert told["default/*"] == "failed"
    assert backup.tasks("acme") == source.tasks("acme")
    assert backup.inspect("default", "new") == source.inspect("default", "new")


def test_a_source_that_goes_away_while_it_is_listed_is_no_empty_one(
    opened: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a backup would lose what the source has lost."""
    place, folder = Folder(tmp_path / "source"), Folder(tmp_path / "backup")
    source, backup = fill(opened(place)), opened(folder)
    run(source, backup, mirror=True)
    before = folder.contents()
    names = source._files.names  # type: ignore[attr-defined]

    def unmounted(*parts: str) -> Any:
        if parts == ("tenants", "default", "tasks"):
            place.wipe()
        return names(*parts)

    monkeypatch.setattr(source._files, "names", unmounted)  # type: ignore[attr-defined]
    with pytest.raises(RegistryUnavailable):
        run(source, backup, mirror=True)
    assert folder.contents() == before


def test_one_task_is_copied_beside_a_deleted_one_that_is_damaged(
    places: Places, opened: Callable[..., Store], tmp_path: Path
) -> None:
    from_disk = Folder(tmp_path / "source")
    source, target = fill(opened(from_disk)), opened(places.new("b"))
    next((from_disk.path / "tenants" / "default" / "deleted").iterdir()).write_text("{")
    assert results(run(source, target, tenant="default", name="e2e")) == {"default/e2e": "copied"}


@pytest.mark.parametrize(("slow", "failed"), [(False, 20), (True, 2)])
def test_failing_tenants_are_skipped_until_they_have_taken_too_long(slow: bool, failed: int) -> None:
    clock = itertools.count(step=12.0) if slow else itertools.repeat(0.0)
    checks: list[None] = []

    class Sound:
        def check(self) -> None:
            checks.append(None)

    failing = FailedTenants(Sound(), lambda: next(clock))
    try:
        for number in range(20):
            with failing.skip_failed(f"tenant{number}"):
                raise RegistryUnavailable("registry: away")
        assert not slow
    except RegistryUnavailable:
        assert slow
    assert len(failing.reasons) == len(checks) == failed


def test_metadata_that_is_not_the_artifacts_is_refused(places: Places, opened: Callable[..., Store]) -> None:
    source, target = fill(opened(places.new("a"))), opened(places.new("b"))
    task = source.inspect("default", "other")
    liar = type(task)(**{**vars(task), "versions": (type(task.versions[0])(**{**vars(task.versions[0]), "size": 1}),)})
    with pytest.raises(InvalidArtifact, match="what the index says"):
        target.adopt(liar, lambda version: source.fetch("default", version))
    assert target.tasks() == []


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

