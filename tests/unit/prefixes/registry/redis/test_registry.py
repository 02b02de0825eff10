"""Publishers that die or race: nothing half-made is seen, nothing named is lost, and all else is taken in the end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from prefixes.errors import Conflict, RegistryUnavailable, TaskNotFound
from prefixes.registry.base import VersionInfo
from prefixes.registry.redis import writer as redis_writer
from prefixes.registry.redis.commands import RedisCommands
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.spec import TaskRef
from tests.support.redis_registry import DATA, VERSIONS, actions, assert_in_step, opened, publish
from tests.support.redis_server import RedisServer, wait_until

FORK = multiprocessing.get_context("fork")  # the children need no fresh import of torch

KEYS = TenantKeys("default")


# --- killed ---


def _publish_until_killed(url: str, method: str) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(RedisCommands, method, die)
    with opened(url) as registry:
        publish(registry, 0)


def killed_before(server: RedisServer, method: str) -> None:
    """A publisher in a process of its own, killed as it is about to take the step."""
    process = FORK.Process(target=_publish_until_killed, args=(server.url, method))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("write_blob", id="after the lease"),
        pytest.param("begin", id="after the artifact"),
        pytest.param("commit", id="before the commit"),
    ],
)
def test_a_killed_publisher_leaves_nothing_to_see_and_its_lease_ends(
    server: RedisServer, registry: RedisRegistry, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(redis_writer, "LEASE_S", 0.5)
    began = time.monotonic()
    killed_before(server, method)
    assert registry.tasks() == []
    assert registry.deleted() == []
    assert registry.audit("default") == []
    for look in (lambda: registry.resolve(TaskRef.parse("e2e")), lambda: registry.fetch("default", VERSIONS[0])):
        with pytest.raises(TaskNotFound):
            look()
    taken = registry.gc(retention_s=0).artifacts
    if time.monotonic() - began < 0.5:
        assert taken == ()
    wait_until(lambda: bool(taken) or bool(registry.gc(retention_s=0).artifacts), lambda: "the lease did not end", 10)
    with server.client() as client:
        assert not client.exists(KEYS.blob(VERSIONS[0]), KEYS.lease(VERSIONS[0]), KEYS.blobs)
    publish(registry, 0)
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]


def test_a_clean_up_spares_what_a_publisher_at_work_has_stored(server: RedisServer, registry: RedisRegistry) -> None:
    killed_before(server, "commit")  # with a lease of ten minutes
    assert registry.gc(retention_s=0).artifacts == ()
    assert registry.gc(retention_s=0, dry_run=True).artifacts == ()


def test_a_publisher_killed_after_its_commit_has_published(
    server: RedisServer, registry: RedisRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_writer, "LEASE_S", 0.2)
    killed_before(server, "release")
    assert registry.fetch("default", registry.resolve(TaskRef.parse("e2e")).version) == DATA[0]
    time.sleep(0.3)
    assert registry.gc(retention_s=0).artifacts == ()  # named: no lease needed
    assert actions(registry.audit("default")) == ["publish"]


def test_an_artifact_taken_from_a_publisher_that_was_too_slow_is_missed_at_its_commit(
    server: RedisServer, registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_writer, "LEASE_S", 0.05)
    commit = registry.commands.commit

    def slow_commit(*args: Any, **options: Any) -> str:
        time.sleep(0.1)
        with opened(server.url) as other:
            assert other.gc(retention_s=0).artifacts == (f"default/{VERSIONS[0]}",)
        return commit(*args, **options)

    monkeypatch.setattr(registry.commands, "commit", slow_commit)
    with pytest.raises(RegistryUnavailable, match="the artifact is gone"):
        publish(registry, 0)
    assert registry.tasks() == []
    assert_in_step(client, registry, "default")


def test_an_artifact_stored_after_its_lease_and_a_clean_up_is_still_listed_for_later_ones(
    server: RedisServer, registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clean-up between a lease's end and a slow upload struck the digest off the list: never collected again."""
    monkeypatch.setattr(redis_writer, "LEASE_S", 0.05)
    write_blob = registry.commands.write_blob

    def slow_write(*args: Any) -> None:
        time.sleep(0.1)
        with opened(server.url) as other:
            other.gc(retention_s=0)
        write_blob(*args)

    monkeypatch.setattr(registry.commands, "write_blob", slow_write)
    publish(registry, 0)
    assert_in_step(client, registry, "default")
    registry.delete("default", "e2e")
    assert registry.gc(retention_s=0).artifacts == (f"default/{VERSIONS[0]}",)
    assert not client.exists(KEYS.blob(VERSIONS[0]))


# --- racing ---


def _move_for(url: str, seed: int, until: float) -> None:
    """A random mix of every change on three names, until a time."""
    generator = random.Random(seed)
    with opened(url) as registry:
        while time.time() < until:
            name = generator.choice(("one", "two", "three"))
            try:
                match generator.randrange(8):
                    case 0 | 1 | 2:
                        publish(registry, generator.randrange(len(DATA)), name=name)
                    case 3:
                        registry.delete("default", name)
                    case 4:
                        registry.undelete("default", name)
                    case 5:
                        registry.promote("default", name, generator.choice(VERSIONS))
                    case 6:
                        registry.rollback("default", name)
                    case 7:
                        registry.delete_version("default", name, generator.choice(VERSIONS))
            except (TaskNotFound, Conflict):
                pass


def _clean_until(url: str, retention_s: float, until: float) -> None:
    with opened(url) as registry:
        while time.time() < until:
            registry.gc(retention_s=retention_s)


def test_clean_ups_racing_with_publishers_lose_nothing_that_is_named(
    server: RedisServer, registry: RedisRegistry, client: Any
) -> None:
    wanted, seeds = {"publish", "delete", "delete_version", "undelete", "purge"}, iter(range(60))
    while not wanted <= set(actions(registry.audit("default", limit=100_000))):
        until = time.time() + 2.0
        processes = [FORK.Process(target=_move_for, args=(server.url, next(seeds), until)) for _ in range(3)]
        processes += [FORK.Process(target=_clean_until, args=(server.url, age, until)) for age in (0.0, 0.2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    assert_in_step(client, registry, "default")
    registry.gc(retention_s=0)
    assert_in_step(client, registry, "default")
    stored = {key.decode() for key in client.scan_iter(match=KEYS.blob("*"))}
    assert stored == {KEYS.blob(info.version) for task in registry.tasks() for info in task.versions}


def test_two_publishers_of_the_same_content_at_once_make_one_version_and_one_entry(
    server: RedisServer, registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    with opened(server.url) as other:
        for each in (registry, other):
            monkeypatch.setattr(each.commands, "begin", _once(each.commands.begin, both))
        results: list[VersionInfo] = []

        def publish_by(each: RedisRegistry) -> None:
            results.append(each.publish("default", "e2e", DATA[0], record={}))

        threads = [threading.Thread(target=publish_by, args=(each,)) for each in (registry, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert [info.version for info in results] == [VERSIONS[0]] * 2
    assert results[0].published_at == results[1].published_at
    (task,) = registry.tasks()
    assert [entry.action for entry in task.history["production"]] == ["publish"]
    assert actions(registry.audit("default")) == ["publish"]
    assert not client.exists(KEYS.lease(VERSIONS[0]))
    assert_in_step(client, registry, "default")


def _once(begin: Callable[..., Any], both: threading.Barrier) -> Callable[..., Any]:
    """``begin`` that waits, the first time, until the other has begun on the same state."""
    met = False

    def meet(*args: Any) -> Any:
        nonlocal met
        found = begin(*args)
        if not met:
            met = True
            both.wait(10)
        return found

    return meet


def test_a_purge_of_a_task_that_came_back_meanwhile_is_none(
    server: RedisServer, registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, 0)
    registry.delete("default", "e2e")
    begin = registry.commands.begin

    def undelete_first(*args: Any) -> Any:
        monkeypatch.undo()
        with opened(server.url) as other:
            other.undelete("default", "e2e")
        return begin(*args)

    monkeypatch.setattr(registry.commands, "begin", undelete_first)
    report = registry.gc(retention_s=0)
    assert (report.tasks, report.artifacts) == ((), ())
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[0]
    assert actions(registry.audit("default")) == ["undelete", "delete", "publish"]
    assert_in_step(client, registry, "default")


def test_a_purge_beside_another_publisher_is_made(
    server: RedisServer, registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, 0)
    registry.delete("default", "e2e")
    begin = registry.commands.begin

    def publish_after(*args: Any) -> Any:
        found = begin(*args)
        monkeypatch.undo()
        with opened(server.url) as other:
            publish(other, 1)
        return found

    monkeypatch.setattr(registry.commands, "begin", publish_after)
    report = registry.gc(retention_s=0)
    assert (report.tasks, report.artifacts) == (("default/e2e",), (f"default/{VERSIONS[0]}",))
    assert registry.deleted() == []
    assert_in_step(client, registry, "default")


def test_a_change_that_others_are_always_quicker_than_is_given_up_unmade(
    server: RedisServer, registry: RedisRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_writer, "EDIT_S", 0.2)
    publish(registry, 0, 1)
    begin = registry.commands.begin
    with opened(server.url) as other:

        def overtaken(*args: Any) -> Any:
            found = begin(*args)
            current = other.resolve(TaskRef.parse("e2e")).version
            other.promote("default", "e2e", VERSIONS[1 - VERSIONS.index(current)])
            return found

        monkeypatch.setattr(registry.commands, "begin", overtaken)
        with pytest.raises(RegistryUnavailable, match="other writers of default/e2e were quicker"):
            registry.delete("default", "e2e")
    assert "delete" not in actions(registry.audit("default"))
    assert [task.name for task in registry.tasks()] == ["e2e"]
