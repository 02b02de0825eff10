"""What every store promises of a tenant's limits: what would pass one is refused whole, also by two writers at once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import prefixes.registry.disk.registry
import prefixes.registry.redis.kept
from prefixes.artifact import write_prefix
from prefixes.errors import QuotaExceeded
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.registry.quota import Kept, kept_by
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.registry.store import TaskStore
from prefixes.tenancy.limits import Limits
from tests.support.prefixes import make_prefix
from tests.support.processes import FORK, in_processes
from tests.support.redis_registry import DATA, VERSIONS, publish, resolve

SIZE = len(DATA[0])
ROOMY = Limits(registry_tasks=100, registry_versions=100, registry_bytes=100 * SIZE)


def state(registry: Store, url: str) -> tuple[Any, ...]:
    """All that a change could leave behind; artifacts without a task are found by a clean-up."""
    with closing(open_registry(url)) as fresh:
        audit = fresh.audit("default") if fresh.tenants() else []
        return fresh.tenants(), fresh.tasks(), fresh.deleted(), audit, fresh.gc(dry_run=True).artifacts


def kept(registry: Store, tenant: str = "default") -> Kept:
    """The total that the store goes by."""
    assert isinstance(registry, TaskStore)
    return registry._kept(tenant)


def counted(registry: Store, tenant: str = "default") -> Kept:
    """The same by counting."""
    return kept_by(registry.tasks(tenant), registry.deleted(tenant))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each time that a store has read all tasks to count them."""
    told: list[int] = []

    def counting(*given: Any) -> Kept:
        told.append(1)
        return kept_by(*given)

    monkeypatch.setattr(prefixes.registry.disk.registry, "kept_by", counting)
    monkeypatch.setattr(prefixes.registry.redis.kept, "kept_by", counting)
    yield told


@pytest.mark.parametrize(
    ("quota", "name"),
    [
        (Limits(registry_tasks=1), "registry_tasks"),
        (Limits(registry_versions=1), "registry_versions"),
        (Limits(registry_bytes=2 * SIZE - 1), "registry_bytes"),
    ],
)
def test_what_would_pass_a_limit_is_refused_whole(registry: Store, url: str, quota: Limits, name: str) -> None:
    publish(registry, 0, quota=quota)
    before = state(registry, url)
    with pytest.raises(QuotaExceeded, match=f"tenant default: {name}: expected at most ") as caught:
        publish(registry, 1, name="other", quota=quota)
    most = getattr(quota, name)
    assert caught.value.detail == {"limit": name, "expected": most, "got": most + 1}
    assert state(registry, url) == before
    publish(registry, 1, name="other", quota=replace(quota, **{name: most + 1}))


def test_a_limit_of_nothing_leaves_no_trace_of_a_new_tenant(registry: Store, url: str) -> None:
    for name in ("registry_tasks", "registry_versions", "registry_bytes"):
        with pytest.raises(QuotaExceeded, match="expected at most 0"):
            publish(registry, 0, quota=Limits(**{name: 0}))
    assert state(registry, url) == ([], [], [], [], ())


def test_what_adds_nothing_is_done_above_a_limit(registry: Store) -> None:
    publish(registry, 0, 1, 2)
    nothing = Limits(registry_tasks=0, registry_versions=0, registry_bytes=0)
    publish(registry, 1, quota=nothing, record={"more": 1})
    assert resolve(registry, "e2e") == 1
    registry.rollback("default", "e2e")
    registry.delete_version("default", "e2e", VERSIONS[1])
    registry.delete("default", "e2e")
    with pytest.raises(QuotaExceeded, match="registry_tasks"):
        registry.undelete("default", "e2e", quota=nothing)
    assert registry.tasks() == []
    registry.undelete("default", "e2e", quota=Limits(registry_tasks=1, registry_versions=0, registry_bytes=0))


def test_whoever_has_the_registry_is_not_limited(registry: Store) -> None:
    publish(registry, 0, quota=Limits(registry_tasks=1))
    publish(registry, 1, name="other")
    publish(registry, 1, name="third", quota=Limits(registry_tasks=3))
    assert kept(registry) == counted(registry) == Kept(3, 3, 3 * SIZE)


def test_bytes_that_another_tenant_has_count_whole(registry: Store) -> None:
    for tenant in ("acme", "globex"):
        publish(registry, 0, tenant=tenant, quota=Limits(registry_bytes=2 * SIZE))
        publish(registry, 0, tenant=tenant, name="again", quota=Limits(registry_bytes=2 * SIZE))
        with pytest.raises(QuotaExceeded, match=f"registry_bytes: expected at most {2 * SIZE}, got {3 * SIZE} "):
            publish(registry, 0, tenant=tenant, name="more", quota=Limits(registry_bytes=2 * SIZE))


def test_what_is_deleted_counts_until_a_clean_up_takes_it_but_for_its_name(registry: Store) -> None:
    """Else whoever publishes and deletes in turn would fill the registry."""
    quota = Limits(registry_tasks=1, registry_versions=2, registry_bytes=2 * SIZE)
    publish(registry, 0, quota=quota)
    registry.delete("default", "e2e")
    publish(registry, 1, name="other", quota=quota)
    with pytest.raises(QuotaExceeded, match="registry_versions: expected at most 2, got 3 with this; versions of what"):
        publish(registry, 2, name="other", quota=quota)
    registry.gc(retention_s=0)
    publish(registry, 2, name="other", quota=quota)
    registry.delete_version("default", "other", VERSIONS[1])
    with pytest.raises(QuotaExceeded):
        publish(registry, 3, name="other", quota=quota)
    registry.gc(retention_s=0)
    publish(registry, 3, name="other", quota=quota)
    assert kept(registry) == counted(registry) == Kept(1, 2, 2 * SIZE)


def _publish_own(index: int, url: str, quota: Limits, made: Any) -> None:
    registry = open_registry(url)
    for number in range(3):
        data = write_prefix(make_prefix(seed=100 + 10 * index + number))
        try:
            registry.publish("default", f"own-{index}-{number}", data, record={}, quota=quota)
            made.put(index)
        except QuotaExceeded:
            pass


@pytest.mark.parametrize(
    "quota", [Limits(registry_tasks=5), Limits(registry_versions=5), Limits(registry_bytes=5 * SIZE)]
)
def test_publishers_at_once_do_not_pass_a_limit_together(url: str, quota: Limits) -> None:
    made = FORK.SimpleQueue()
    assert in_processes(4, _publish_own, url, quota, made) == [0, 0, 0, 0]
    with closing(open_registry(url)) as registry:
        assert len(registry.tasks()) == 5
        for _ in range(5):
            made.get()
        assert made.empty()
        assert kept(registry) == counted(registry) == Kept(5, 5, 5 * SIZE)


def test_a_writer_that_is_quicker_is_counted(registry: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the total and the change another publish takes the last place."""
    publish(registry, 0, quota=ROOMY)
    assert isinstance(registry, TaskStore)
    writing = registry._writing
    put: list[int] = []

    def late(tenant: str) -> Any:
        if not put:
            put.append(1)
            with closing(open_registry(url)) as other:
                publish(other, 1, name="quicker", quota=Limits(registry_tasks=2))
        return writing(tenant)

    monkeypatch.setattr(registry, "_writing", late)
    with pytest.raises(QuotaExceeded, match="registry_tasks: expected at most 2, got 3"):
        publish(registry, 2, name="late", quota=Limits(registry_tasks=2))
    assert put and [task.name for task in registry.tasks()] == ["e2e", "quicker"]


def test_the_total_agrees_with_counting_after_any_changes(registry: Store, tmp_path: Path) -> None:
    publish(registry, 0, quota=ROOMY)
    chance = random.Random(7)
    with closing(open_registry(f"disk://{tmp_path}/other")) as other:
        publish(other, 0, 2, name="copied")
        for _ in range(40):
            name, index = chance.choice(["e2e", "a", "b"]), chance.randrange(4)
            there = {task.name: task for task in registry.tasks("default")}
            act = chance.choice(["publish", "limited", "delete", "undelete", "version", "copy", "gc"])
            gone = {item.task.name for item in registry.deleted("default") if item.task.aliases}
            if act in ("publish", "limited"):
                publish(registry, index, name=name, quota=ROOMY if act == "limited" else None)
            elif act == "delete" and name in there:
                registry.delete("default", name)
            elif act == "undelete" and name in gone - there.keys():
                registry.undelete("default", name, quota=ROOMY)
            elif act == "version" and name in there:
                pointed = set(there[name].aliases.values())
                for info in [info for info in there[name].versions if info.version not in pointed][:1]:
                    registry.delete_version("default", name, info.version)
            elif act == "copy":
                registry.adopt(other.inspect("default", "copied"), lambda v: other.fetch("default", v), replace=True)
            elif act == "gc":
                registry.gc(retention_s=0)
            assert kept(registry) == counted(registry), act


def test_a_publish_does_not_count_what_is_there(registry: Store, counts: list[int]) -> None:
    for number in range(6):
        publish(registry, number % 4, name=f"task-{number}")
    publish(registry, 0, name="limited", quota=ROOMY)
    first = len(counts)
    for number in range(6):
        publish(registry, number % 4, name=f"limited-{number}", quota=ROOMY)
        publish(registry, 1, name=f"task-{number}")
    registry.delete("default", "task-0")
    registry.undelete("default", "task-0", quota=ROOMY)
    assert len(counts) == first <= 2  # in a folder the first time, before it and under its lock


def test_a_change_by_an_older_release_is_found_out(registry: Store, url: str, counts: list[int]) -> None:
    """It keeps no total up."""
    publish(registry, 0, quota=ROOMY)
    publish(registry, 1, name="older")
    if isinstance(registry, RedisRegistry):
        client, keys = registry.commands._client, TenantKeys("default")
        client.hset(keys.total, mapping={"tasks": 1, "versions": 1, "bytes": SIZE, "at": "1-1"})
    else:
        file = Path(url.removeprefix("disk://")) / "tenants/default/last-change.json"
        raw = json.loads(file.read_text())
        del raw["kept"]
        file.write_text(json.dumps(raw))
    counts.clear()
    with pytest.raises(QuotaExceeded, match="registry_tasks: expected at most 2, got 3"):
        publish(registry, 2, name="third", quota=Limits(registry_tasks=2))
    assert counts
    publish(registry, 2, name="third", quota=ROOMY)
    assert kept(registry) == counted(registry) == Kept(3, 3, 3 * SIZE)
