"""What every store promises of deleting one version, and of how many versions, tasks and moves it keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefixes.errors import Conflict, InvalidName, LimitReached, TaskNotFound
from prefixes.registry import limits, open_registry
from prefixes.registry.base import Store
from prefixes.registry.limits import HISTORY_KEPT
from prefixes.spec import TaskRef
from tests.support.redis_registry import DATA, VERSIONS, publish, resolve


def test_a_deleted_version_is_gone_and_its_artifact_stays_until_the_clean_up(registry: Store, url: str) -> None:
    publish(registry, 0, 1, 2)
    registry.delete_version("default", "e2e", VERSIONS[1], actor="ann")
    for handle in (registry, open_registry(url)):
        task = handle.inspect("default", "e2e")
        assert [info.version for info in task.versions] == [VERSIONS[2], VERSIONS[0]]
        for call in (
            lambda handle=handle: resolve(handle, f"e2e@{VERSIONS[1]}"),
            lambda handle=handle: handle.promote("default", "e2e", VERSIONS[1]),
            lambda handle=handle: handle.delete_version("default", "e2e", VERSIONS[1]),  # repeated
        ):
            with pytest.raises(TaskNotFound, match=VERSIONS[1]):
                call()
    assert resolve(registry, "e2e") == 2
    assert registry.fetch("default", VERSIONS[1]) == DATA[1], "rows that were admitted before still load"
    assert registry.gc().artifacts == ()
    assert registry.gc(retention_s=0).artifacts == (f"default/{VERSIONS[1]}",)
    with pytest.raises(TaskNotFound):
        registry.fetch("default", VERSIONS[1])
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]
    publish(registry, 1)
    assert resolve(registry, "e2e") == 1
    last, _, deleted, *_ = registry.audit("default")
    assert (last.action, deleted.action, deleted.actor, deleted.task) == (
        "publish", "delete_version", "ann", "default/e2e"
    )  # fmt: skip
    assert (deleted.alias, deleted.old, deleted.new) == (None, VERSIONS[1], None)


def test_a_version_that_an_alias_points_at_is_not_deleted(registry: Store) -> None:
    publish(registry, 0)
    publish(registry, 1, alias="canary")
    before = (registry.inspect("default", "e2e"), registry.audit("default"))
    for number, alias in ((0, "production"), (1, "canary")):
        with pytest.raises(Conflict, match=f"expected no alias that points at it, got {alias}") as caught:
            registry.delete_version("default", "e2e", VERSIONS[number])
        assert caught.value.detail == {"aliases": [alias]}
    assert (registry.inspect("default", "e2e"), registry.audit("default")) == before
    assert registry.deleted() == []


def test_a_delete_of_a_version_that_is_not_there_leaves_nothing(registry: Store) -> None:
    publish(registry, 0)
    publish(registry, 1, name="other")
    for tenant, name, version in (("default", "e2e", 1), ("default", "nothing", 0), ("acme", "e2e", 0)):
        with pytest.raises(TaskNotFound):
            registry.delete_version(tenant, name, VERSIONS[version])
    for arguments in (("", "e2e", VERSIONS[0]), ("default", "a/b", VERSIONS[0]), ("default", "e2e", "production")):
        with pytest.raises(InvalidName):
            registry.delete_version(*arguments)
    assert registry.tenants() == ["default"]
    assert registry.deleted() == []


def test_an_artifact_of_two_tasks_stays_with_the_other(registry: Store) -> None:
    publish(registry, 0, 1)
    publish(registry, 0, name="other")
    registry.delete_version("default", "e2e", VERSIONS[0])
    assert registry.gc(retention_s=0).artifacts == ()
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]
    assert resolve(registry, "other") == 0


def test_a_rollback_passes_over_deleted_versions(registry: Store) -> None:
    publish(registry, 0, 1, 2, 3)
    registry.delete_version("default", "e2e", VERSIONS[2])
    registry.delete_version("default", "e2e", VERSIONS[1])
    task = registry.rollback("default", "e2e", expected_current=VERSIONS[3])
    assert task.aliases["production"] == VERSIONS[0]
    assert task == registry.inspect("default", "e2e")
    with pytest.raises(Conflict, match="expected an earlier version"):
        registry.rollback("default", "e2e")
    assert [(entry.old, entry.new) for entry in registry.audit("default", limit=1)] == [(VERSIONS[3], VERSIONS[0])]


def test_a_rollback_does_not_stay_where_it_is(registry: Store) -> None:
    publish(registry, 2, 0, 1, 0)
    registry.delete_version("default", "e2e", VERSIONS[1])
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[2]


def test_a_repeated_publish_does_not_bring_back_a_deleted_version(registry: Store) -> None:
    """A build of last month that is run again would move production back to what was pruned since."""
    publish(registry, 0, idempotency_key="job-1")
    publish(registry, 1, idempotency_key="job-2")
    registry.delete_version("default", "e2e", VERSIONS[0])
    with pytest.raises(Conflict, match="expected a publish key that is new, got job-1"):
        publish(registry, 0, idempotency_key="job-1")
    publish(registry, 0, idempotency_key="job-2")
    assert resolve(registry, "e2e") == 1


def test_a_task_that_lost_versions_is_deleted_and_comes_back_without_them(registry: Store) -> None:
    publish(registry, 0, 1)
    registry.delete_version("default", "e2e", VERSIONS[0])
    task = registry.inspect("default", "e2e")
    registry.delete("default", "e2e")
    assert registry.undelete("default", "e2e") == task
    assert registry.gc(retention_s=0).artifacts == (f"default/{VERSIONS[0]}",)
    assert registry.inspect("default", "e2e") == task


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("MAX_VERSIONS", 3), ("MAX_TASKS", 2), ("MAX_ALIASES", 2)):
        monkeypatch.setattr(limits, name, most)


@pytest.mark.usefixtures("small")
def test_a_task_has_so_many_versions_and_a_prune_makes_room(registry: Store) -> None:
    publish(registry, 0, 1, 2)
    before = (registry.inspect("default", "e2e"), registry.audit("default"))
    with pytest.raises(LimitReached, match="expected at most 3 versions, got 4; `prefixd prefixes prune") as caught:
        publish(registry, 3)
    assert caught.value.detail == {"expected": 3, "got": 4}
    assert (registry.inspect("default", "e2e"), registry.audit("default")) == before
    assert registry.gc(retention_s=0).artifacts == (), "what was refused stored no artifact"
    publish(registry, 0)
    registry.delete_version("default", "e2e", VERSIONS[1])
    publish(registry, 3)
    assert resolve(registry, "e2e") == 3


@pytest.mark.usefixtures("small")
def test_a_tenant_has_so_many_tasks(registry: Store) -> None:
    publish(registry, 0, name="a")
    publish(registry, 0, name="b")
    publish(registry, 1, name="b")
    publish(registry, 0, tenant="acme")
    with pytest.raises(LimitReached, match="tenant default: expected at most 2 tasks, got 3"):
        publish(registry, 0, name="c")
    registry.delete("default", "a")
    publish(registry, 0, name="c")
    with pytest.raises(LimitReached):
        registry.undelete("default", "a")
    assert [task.name for task in registry.tasks("default")] == ["b", "c"]


@pytest.mark.usefixtures("small")
def test_a_task_has_so_many_aliases(registry: Store) -> None:
    publish(registry, 0, 1)
    publish(registry, 1, alias="canary")
    calls: list[Callable[[], object]] = [
        lambda: registry.promote("default", "e2e", VERSIONS[0], alias="third"),
        lambda: publish(registry, 0, alias="third"),
    ]
    for call in calls:
        with pytest.raises(LimitReached, match="expected at most 2 aliases, got 3"):
            call()
    registry.promote("default", "e2e", VERSIONS[0], alias="canary")


def test_a_task_is_so_large_at_most(registry: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, 0, 1, record={"text": "x" * 10_000})
    monkeypatch.setattr(limits, "TASK_BYTES", 25_000)
    publish(registry, 2)
    with pytest.raises(LimitReached, match=r"expected at most 25000 bytes of JSON, got .*; `prefixd prefixes prune"):
        publish(registry, 3, record={"text": "x" * 10_000})
    monkeypatch.setattr(limits, "TASK_BYTES", 10_000)  # as one of an older release that is larger already
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[1]
    registry.delete_version("default", "e2e", VERSIONS[2])
    with pytest.raises(LimitReached):
        publish(registry, 2)
    assert len(registry.inspect("default", "e2e").versions) == 2


def test_a_history_is_bounded_and_what_a_rollback_needs_stays(registry: Store) -> None:
    publish(registry, 0, 1, 2)
    for step in range(HISTORY_KEPT):
        task = registry.promote("default", "e2e", VERSIONS[step % 2])
    history = task.history["production"]
    assert HISTORY_KEPT // 2 < len(history) <= HISTORY_KEPT
    assert task == registry.inspect("default", "e2e")
    assert history[-1].version == task.aliases["production"] == VERSIONS[1]
    for step in range(HISTORY_KEPT // 2):
        assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[step % 2]
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]
