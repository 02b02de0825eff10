"""A copy goes on past what is damaged: a bad task or tenant keeps back no other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import InvalidArtifact, RegistryUnavailable
from prefixes.registry.base import Store
from prefixes.registry.failed_tenants import FailedTenants
from prefixes.registry.transfer import transfer as run
from tests.support.disk import DATA, blob
from tests.support.places import Folder, Places
from tests.support.transfers import fill, publish, results


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
