"""What every store promises, whatever it is; see ``conftest.py`` for which there are."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.errors import Conflict, InvalidArtifact, InvalidName, RegistryUnavailable, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import GcReport, Registry, Store
from prefixes.spec import TaskRef
from tests.support.prefixes import make_prefix
from tests.support.processes import FORK, in_processes

PREFIXES = [make_prefix(seed=seed) for seed in range(4)]
DATA = [write_prefix(prefix) for prefix in PREFIXES]
VERSIONS = [version_of(prefix) for prefix in PREFIXES]


def publish(registry: Registry, *indices: int, tenant: str = "default", name: str = "e2e", **options: Any) -> None:
    for index in indices:
        registry.publish(tenant, name, DATA[index], **{"record": {}, **options})


def resolve(registry: Registry, ref: str) -> int:
    return VERSIONS.index(registry.resolve(TaskRef.parse(ref)).version)


def test_a_published_prefix_is_resolved_fetched_and_listed(registry: Registry) -> None:
    info = registry.publish("acme", "e2e", DATA[0], record={"bleu": 68.2, "by": "ci"})
    assert (info.version, info.size, info.spec) == (VERSIONS[0], len(DATA[0]), PREFIXES[0].spec)
    resolved = registry.resolve(TaskRef.parse("acme/e2e"))
    assert (resolved.tenant, resolved.name, resolved.version) == ("acme", "e2e", VERSIONS[0])
    assert resolved.spec == PREFIXES[0].spec
    assert registry.fetch("acme", VERSIONS[0]) == DATA[0]
    (task,) = registry.tasks()
    assert task == registry.inspect("acme", "e2e")
    assert task.aliases == {"production": VERSIONS[0]}
    assert task.versions == (info,)
    assert info.record == {"bleu": 68.2, "by": "ci"}
    assert info.published_at.endswith("Z")


def test_another_handle_sees_every_change_at_once(registry: Registry, url: str) -> None:
    other = open_registry(url)
    publish(registry, 0, 1)
    assert resolve(other, "e2e") == 1
    registry.promote("default", "e2e", VERSIONS[0])
    assert resolve(other, "e2e") == 0
    other.rollback("default", "e2e")
    assert resolve(registry, "e2e") == 1
    other.delete("default", "e2e")
    with pytest.raises(TaskNotFound):
        registry.inspect("default", "e2e")


def test_references_by_alias_and_by_version(registry: Registry) -> None:
    publish(registry, 0)
    publish(registry, 1, alias="canary")
    publish(registry, 2, alias=None)
    assert resolve(registry, "e2e") == 0
    assert resolve(registry, "default/e2e@canary") == 1
    assert resolve(registry, f"e2e@{VERSIONS[2]}") == 2
    assert set(registry.inspect("default", "e2e").aliases) == {"production", "canary"}
    assert [info.version for info in registry.inspect("default", "e2e").versions] == VERSIONS[2::-1]


@pytest.mark.parametrize("ref", ["nothing", "acme/e2e", "e2e@canary", f"e2e@{VERSIONS[3]}"])
def test_unknown_tasks_tenants_aliases_and_versions_are_not_found(registry: Registry, ref: str) -> None:
    publish(registry, 0)
    publish(registry, 3, name="other")
    with pytest.raises(TaskNotFound):
        registry.resolve(TaskRef.parse(ref))


def test_publishing_the_same_content_twice_is_one_version(registry: Registry) -> None:
    first = registry.publish("default", "e2e", DATA[0], record={"loss": 1.5})
    publish(registry, 1)
    again = registry.publish("default", "e2e", DATA[0], record={"bleu": 68.0})
    task = registry.inspect("default", "e2e")
    assert len(task.versions) == 2
    assert again.published_at == first.published_at
    assert again.record == {"loss": 1.5, "bleu": 68.0}
    assert task.aliases["production"] == VERSIONS[0]
    publish(registry, 0)
    assert len(registry.inspect("default", "e2e").history["production"]) == 3


def test_history_tells_every_move(registry: Registry) -> None:
    publish(registry, 0, 1)
    registry.promote("default", "e2e", VERSIONS[0])
    task = registry.rollback("default", "e2e")
    history = task.history["production"]
    assert [(VERSIONS.index(entry.version), entry.action) for entry in history] == [
        (0, "publish"),
        (1, "publish"),
        (0, "promote"),
        (1, "rollback"),
    ]
    assert sorted(entry.at for entry in history) == [entry.at for entry in history]
    assert task == registry.inspect("default", "e2e")


def test_rolling_back_twice_goes_two_versions_back(registry: Registry) -> None:
    """A rollback to the previous *entry* would go to and fro between the last two."""
    publish(registry, 0, 1, 2)
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[1]
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]
    with pytest.raises(Conflict, match="expected an earlier version"):
        registry.rollback("default", "e2e")
    assert resolve(registry, "e2e") == 0
    publish(registry, 3)
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]
    registry.promote("default", "e2e", VERSIONS[2])
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]


def test_promoting_where_it_already_points_is_no_move(registry: Registry) -> None:
    publish(registry, 0, 1)
    task = registry.promote("default", "e2e", VERSIONS[1])
    assert len(task.history["production"]) == 2
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]


def test_promote_compares_before_it_sets(registry: Registry) -> None:
    publish(registry, 0, 1)
    with pytest.raises(Conflict, match=f"expected it at {VERSIONS[0]}, got {VERSIONS[1]}"):
        registry.promote("default", "e2e", VERSIONS[0], expected_current=VERSIONS[0])
    registry.promote("default", "e2e", VERSIONS[0], expected_current=VERSIONS[1])
    assert resolve(registry, "e2e") == 0
    with pytest.raises(Conflict, match="got no such alias"):
        registry.promote("default", "e2e", VERSIONS[0], alias="canary", expected_current=VERSIONS[0])


def test_promote_makes_an_alias_of_its_own(registry: Registry) -> None:
    publish(registry, 0, 1)
    registry.promote("default", "e2e", VERSIONS[0], alias="stable")
    assert (resolve(registry, "e2e@stable"), resolve(registry, "e2e")) == (0, 1)
    with pytest.raises(Conflict):
        registry.rollback("default", "e2e", alias="stable")
    with pytest.raises(TaskNotFound, match="alias 'nightly'"):
        registry.rollback("default", "e2e", alias="nightly")


def test_promote_of_an_unknown_version_or_task_is_not_found(registry: Registry) -> None:
    publish(registry, 0)
    publish(registry, 1, name="other")
    with pytest.raises(TaskNotFound, match=VERSIONS[1]):
        registry.promote("default", "e2e", VERSIONS[1])
    with pytest.raises(TaskNotFound):
        registry.promote("default", "nothing", VERSIONS[0])
    with pytest.raises(TaskNotFound):
        registry.rollback("default", "nothing")


def test_a_tenant_reaches_only_its_own_digests(registry: Registry) -> None:
    publish(registry, 0, tenant="acme")
    publish(registry, 1, tenant="globex")
    assert registry.fetch("acme", VERSIONS[0]) == DATA[0]
    for tenant, version in (("globex", VERSIONS[0]), ("acme", VERSIONS[1]), ("nobody", VERSIONS[0])):
        with pytest.raises(TaskNotFound):
            registry.fetch(tenant, version)
        with pytest.raises(TaskNotFound):
            registry.resolve(TaskRef(tenant, "e2e", None, version))
        with pytest.raises(TaskNotFound):
            registry.promote(tenant, "e2e", version)
    assert [task.tenant for task in registry.tasks("acme")] == ["acme"]
    assert registry.tasks("nobody") == []


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


def test_a_registry_is_told_from_every_other_by_its_id(registry: Store, url: str) -> None:
    assert open_registry(url, registry_id=registry.id).id == registry.id
    with pytest.raises(RegistryUnavailable, match=f"expected another, got {registry.id}"):
        open_registry(url, registry_id="another")


def test_tasks_are_sorted_by_tenant_and_name(registry: Registry) -> None:
    for tenant, name in (("b", "x"), ("a", "y"), ("a", "x-1"), ("a", "x"), ("a", "x.json")):
        publish(registry, 0, tenant=tenant, name=name)
    found = [(task.tenant, task.name) for task in registry.tasks()]
    assert found == [("a", "x"), ("a", "x-1"), ("a", "x.json"), ("a", "y"), ("b", "x")]


@pytest.mark.parametrize("data", [b"", b"junk", DATA[0][:-1], DATA[0] + b"\0"])
def test_bad_artifacts_are_refused_and_leave_nothing(registry: Registry, data: bytes) -> None:
    with pytest.raises(InvalidArtifact):
        registry.publish("default", "e2e", data, record={})
    assert registry.tasks() == []


def test_a_record_that_is_no_json_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidArtifact, match=r"record\.loss: expected a finite number"):
        registry.publish("default", "e2e", DATA[0], record={"loss": float("nan")})
    assert registry.tasks() == []


PATH_TRICKS = ["", ".", "..", "a/b", "../a", "/etc", "a\\b", ".a", "a..b", "a\0", "~a", "-a", "x" * 65, "x" * 100_000]
LOOK_ALIKES = ["A", "é", "аcme", "ａcme", "acme\u200b", "acme\u202e", "\u212aelvin", "a\u0301", "ﬁ", "٣", "a\n", "a b"]
SYNTAX = ["a:b", "{a}", "a}b", "a*", "a?", "a[b]", "a@b", "a%2fb", "$a", "a\r\nDEL b"]  # of Redis, a URL or a shell
BAD_NAMES = [*PATH_TRICKS, *LOOK_ALIKES, *SYNTAX]


@pytest.mark.parametrize("bad", BAD_NAMES, ids=ascii)
def test_no_name_leads_anywhere_else(registry: Registry, bad: str) -> None:
    publish(registry, 0)
    calls: list[Callable[[], object]] = [
        lambda: registry.publish(bad, "e2e", DATA[0], record={}),
        lambda: registry.publish("default", bad, DATA[0], record={}),
        lambda: registry.publish("default", "e2e", DATA[0], record={}, alias=bad),
        lambda: registry.promote("default", "e2e", VERSIONS[0], alias=bad),
        lambda: registry.promote("default", "e2e", bad),
        lambda: registry.rollback(bad, "e2e"),
        lambda: registry.delete(bad, "e2e"),
        lambda: registry.delete("default", bad),
        lambda: registry.inspect("default", bad),
        lambda: registry.tasks(bad),
        lambda: registry.fetch(bad, VERSIONS[0]),
        lambda: registry.fetch("default", bad),
        lambda: registry.resolve(TaskRef(bad, "e2e")),
    ]
    for call in calls:
        with pytest.raises(InvalidName):
            call()


def test_a_healthy_registry_checks_and_closes(registry: Registry) -> None:
    publish(registry, 0)
    registry.check()
    registry.close()


def _publish_all(index: int, url: str) -> None:
    registry = open_registry(url)
    for step in range(len(DATA)):
        publish(registry, (step + index) % len(DATA))
        publish(registry, step, name=f"own-{index}")


def test_publishers_in_several_processes_lose_nothing(url: str) -> None:
    assert in_processes(4, _publish_all, url) == [0, 0, 0, 0]
    registry = open_registry(url)
    task = registry.inspect("default", "e2e")
    assert {info.version for info in task.versions} == set(VERSIONS)
    assert task.aliases["production"] == task.history["production"][-1].version
    assert [task.name for task in registry.tasks()] == ["e2e", "own-0", "own-1", "own-2", "own-3"]
    for version in VERSIONS:
        read_prefix(registry.fetch("default", version), expected_version=version)


def _compare_and_set(index: int, url: str, wins: Any) -> None:
    registry = open_registry(url)
    try:
        registry.promote("default", "e2e", VERSIONS[1 + index % 2], expected_current=VERSIONS[0])
        wins.put(index)
    except Conflict:
        pass


def test_of_several_compare_and_sets_one_wins(url: str) -> None:
    publish(open_registry(url), 1, 2, 0)
    wins = FORK.SimpleQueue()
    assert in_processes(4, _compare_and_set, url, wins) == [0, 0, 0, 0]
    winner = wins.get()
    assert wins.empty()
    registry, won = open_registry(url), 1 + winner % 2
    assert resolve(registry, "e2e") == won
    history = [move.version for move in registry.inspect("default", "e2e").history["production"]]
    assert history == [*(VERSIONS[number] for number in (1, 2, 0)), VERSIONS[won]], "what lost has left nothing"
    moves = [entry for entry in registry.audit("default") if entry.action == "promote"]
    assert [(entry.old, entry.new) for entry in moves] == [(VERSIONS[0], VERSIONS[won])]


def test_readers_see_a_whole_version_before_or_after_every_promote(registry: Registry, url: str) -> None:
    publish(registry, 0, 1)
    done = threading.Event()
    faults: list[BaseException] = []
    seen: set[int] = set()

    def read() -> None:
        own = open_registry(url)
        try:
            while not done.is_set():
                version = own.resolve(TaskRef.parse("e2e")).version
                read_prefix(own.fetch("default", version), expected_version=version)
                seen.add(VERSIONS.index(version))
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for step in range(40):
        registry.promote("default", "e2e", VERSIONS[step % 2])
    done.set()
    for reader in readers:
        reader.join()
    assert faults == []
    assert seen == {0, 1}


def _publish_and_promote_for_ever(url: str) -> None:
    registry = open_registry(url)
    while True:
        for index in range(1, 4):
            publish(registry, index)
            publish(registry, index, name="other")
        registry.promote("default", "e2e", VERSIONS[1])
        registry.delete("default", "other")


def assert_whole(registry: Registry) -> None:
    registry.check()
    for task in registry.tasks():
        assert task.aliases == {alias: history[-1].version for alias, history in task.history.items()}
        for info in task.versions:
            prefix = read_prefix(registry.fetch(task.tenant, info.version), expected_version=info.version)
            assert prefix.spec == info.spec


def test_a_writer_killed_at_any_moment_leaves_a_whole_registry(url: str) -> None:
    publish(open_registry(url), 0)
    generator = random.Random(0)
    for _ in range(12):
        process = FORK.Process(target=_publish_and_promote_for_ever, args=(url,))
        process.start()
        assert process.pid is not None
        time.sleep(generator.uniform(0.02, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        registry = open_registry(url)
        assert_whole(registry)
        publish(registry, 0)  # the dead writer's lock is free
        assert resolve(registry, "e2e") == 0


@pytest.mark.parametrize(
    "bad", ["redis://:secret@a,b/0", "redis://:secret@h?db=1", "https://h/r", "s3:bucket", "disk://host/path", ""]
)
def test_urls_of_other_stores_are_named_errors_without_their_secrets(bad: str) -> None:
    with pytest.raises(RegistryUnavailable, match="registry URL: expected") as caught:
        open_registry(bad)
    assert "secret" not in caught.value.message
