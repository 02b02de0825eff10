"""What every store promises of deleting and restoring tasks, the clean-up, the audit, and tasks from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixes.errors import Conflict, InvalidArtifact, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import GcReport, Store
from tests.support.redis_registry import DATA, VERSIONS, publish, resolve


def test_a_deleted_task_is_gone_and_its_artifacts_stay_for_rows_that_were_admitted(registry: Store) -> None:
    publish(registry, 0, 1)
    registry.delete("default", "e2e")
    for call in (
        lambda: registry.inspect("default", "e2e"),
        lambda: resolve(registry, "e2e"),
        lambda: resolve(registry, f"e2e@{VERSIONS[0]}"),
        lambda: registry.promote("default", "e2e", VERSIONS[0]),
        lambda: registry.delete("default", "e2e"),
    ):
        with pytest.raises(TaskNotFound):
            call()
    assert registry.tasks() == []
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]


def test_a_deleted_task_comes_back_as_it_was(registry: Store) -> None:
    publish(registry, 0, 1)
    before = registry.inspect("default", "e2e")
    registry.delete("default", "e2e")
    assert [item.task for item in registry.deleted()] == [before]
    assert registry.undelete("default", "e2e") == before == registry.inspect("default", "e2e")
    assert registry.deleted("default") == []
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]
    with pytest.raises(Conflict, match="expected no task of that name"):
        registry.undelete("default", "e2e")
    with pytest.raises(TaskNotFound):
        registry.undelete("default", "nothing")


def test_of_a_task_deleted_twice_the_last_comes_back_first(registry: Store) -> None:
    publish(registry, 0)
    registry.delete("default", "e2e")
    publish(registry, 1)
    assert len(registry.inspect("default", "e2e").history["production"]) == 1
    registry.delete("default", "e2e")
    assert len(registry.deleted("default")) == 2
    registry.undelete("default", "e2e")
    assert resolve(registry, "e2e") == 1
    registry.delete("default", "e2e")
    registry.gc(retention_s=3600)
    assert len(registry.deleted("default")) == 2


def test_gc_takes_what_nothing_names_and_nothing_else(registry: Store) -> None:
    publish(registry, 0, 1)
    publish(registry, 1, name="other")
    publish(registry, 0, tenant="globex")
    registry.delete("default", "e2e")
    assert registry.gc() == registry.gc(dry_run=True) == GcReport((), (), 0)
    expected = GcReport(("default/e2e",), (f"default/{VERSIONS[0]}",), len(DATA[0]))
    assert registry.gc(retention_s=0, dry_run=True) == expected
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]
    assert registry.gc(retention_s=0) == expected
    with pytest.raises(TaskNotFound):
        registry.fetch("default", VERSIONS[0])
    with pytest.raises(TaskNotFound):
        registry.undelete("default", "e2e")
    assert registry.fetch("default", VERSIONS[1]) == DATA[1]
    assert registry.fetch("globex", VERSIONS[0]) == DATA[0]
    assert registry.gc(retention_s=0) == GcReport((), (), 0)
    publish(registry, 0)
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]


def test_every_change_has_its_audit_entry_and_nothing_else_has(registry: Store) -> None:
    publish(registry, 0, actor="ann")
    publish(registry, 0, actor="bob")  # no change
    publish(registry, 1, alias="canary", actor="ann")
    publish(registry, 3, alias=None, actor="fay")
    registry.promote("default", "e2e", VERSIONS[1], actor="cid")
    with pytest.raises(Conflict):
        registry.promote("default", "e2e", VERSIONS[0], expected_current=VERSIONS[2], actor="eve")
    registry.rollback("default", "e2e", actor="dan")
    registry.delete("default", "e2e", actor="ann")
    registry.undelete("default", "e2e", actor="bob")
    registry.delete("default", "e2e", actor="ann")
    registry.gc(retention_s=0, actor="cron")
    publish(registry, 2, tenant="globex", actor="gus")
    entries = registry.audit("default")
    assert [(entry.actor, entry.action, entry.alias, number(entry.old), number(entry.new)) for entry in entries] == [
        ("cron", "purge", None, 0, None),
        ("ann", "delete", None, 0, None),
        ("bob", "undelete", None, None, 0),
        ("ann", "delete", None, 0, None),
        ("dan", "rollback", "production", 1, 0),
        ("cid", "promote", "production", 0, 1),
        ("fay", "publish", None, None, 3),
        ("ann", "publish", "canary", None, 1),
        ("ann", "publish", "production", None, 0),
    ]
    assert {entry.task for entry in entries} == {"default/e2e"}
    assert registry.audit("default", limit=2) == entries[:2]
    assert [entry.actor for entry in registry.audit("globex")] == ["gus"]
    assert registry.audit("nobody") == []


def number(version: str | None) -> int | None:
    return None if version is None else VERSIONS.index(version)


def test_a_task_is_adopted_with_its_history(registry: Store, tmp_path: Path) -> None:
    source = open_registry(f"{tmp_path}/source")
    publish(source, 0, 1, record={"bleu": 68.0})
    source.rollback("default", "e2e")
    task = source.inspect("default", "e2e")
    assert registry.adopt(task, lambda version: source.fetch("default", version), actor="copy") is True
    assert registry.inspect("default", "e2e") == task
    assert registry.fetch("default", VERSIONS[1]) == DATA[1]
    assert registry.adopt(task, lambda version: pytest.fail("there is nothing to fetch")) is False
    assert [entry.action for entry in registry.audit("default")] == ["copy"]


def test_an_adopted_task_replaces_another_only_when_told(registry: Store, tmp_path: Path) -> None:
    source = open_registry(f"{tmp_path}/source")
    publish(source, 0)
    publish(registry, 1)
    task, old = source.inspect("default", "e2e"), registry.inspect("default", "e2e")
    with pytest.raises(Conflict, match="found another"):
        registry.adopt(task, lambda version: pytest.fail("a conflict shows before anything is fetched"))
    assert registry.adopt(task, lambda version: DATA[0], replace=True)
    assert registry.inspect("default", "e2e") == task
    assert [item.task for item in registry.deleted()] == [old]
    registry.gc()
    registry.delete("default", "e2e")
    assert registry.undelete("default", "e2e") == task


def test_a_task_whose_artifacts_are_others_is_not_adopted(registry: Store, tmp_path: Path) -> None:
    source = open_registry(f"{tmp_path}/source")
    publish(source, 0)
    with pytest.raises(InvalidArtifact):
        registry.adopt(source.inspect("default", "e2e"), lambda version: DATA[1])
    assert registry.tasks() == []


@pytest.mark.parametrize("change", ["delete", "rollback", "undelete", "promote"])
@pytest.mark.parametrize("tenant", ["ghost1", "acme"])
def test_a_change_of_a_task_that_is_not_there_leaves_nothing(registry: Store, change: str, tenant: str) -> None:
    """It made a folder for a tenant that nobody has, which every list and every clean-up then went through."""
    publish(registry, 0)
    before = (registry.tenants(), registry.tasks(), registry.lost_tenants())
    arguments = [VERSIONS[0]] if change == "promote" else []
    with pytest.raises(TaskNotFound):
        getattr(registry, change)(tenant, "nope", *arguments)
    assert (registry.tenants(), registry.tasks(), registry.lost_tenants()) == before == (["default"], before[1], [])
    assert registry.audit(tenant) == []
