"""What every store promises of writers and readers at the same time, and of a writer that is killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

from prefixes.artifact import read_prefix
from prefixes.errors import Conflict
from prefixes.registry import open_registry
from prefixes.registry.base import Registry
from prefixes.spec import TaskRef
from tests.support.processes import FORK, in_processes
from tests.support.redis_registry import DATA, VERSIONS, publish, resolve


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


def _roll_back(index: int, url: str, wins: Any) -> None:
    try:
        open_registry(url).rollback("default", "e2e", expected_current=VERSIONS[3])
        wins.put(index)
    except Conflict:
        pass


def test_of_several_rollbacks_from_one_version_one_is_made(url: str) -> None:
    publish(open_registry(url), 0, 1, 2, 3)
    wins = FORK.SimpleQueue()
    assert in_processes(4, _roll_back, url, wins) == [0, 0, 0, 0]
    wins.get()
    assert wins.empty()
    registry = open_registry(url)
    assert resolve(registry, "e2e") == 2
    assert [entry.action for entry in registry.audit("default")].count("rollback") == 1


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
