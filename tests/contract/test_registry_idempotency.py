"""Publishing exactly once: a publish that is repeated with its key changes nothing, whatever happened in between."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import Conflict, InvalidName, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import AuditEntry, IdempotencyKey, Registry, Store, TaskInfo, VersionInfo
from prefixes.registry.limits import KEYS_KEPT
from prefixes.spec import TaskRef
from tests.support.processes import FORK, in_processes
from tests.support.redis_registry import DATA, VERSIONS, publish


def repeat(registry: Registry, data: bytes, key: str, **options: Any) -> VersionInfo:
    """A publish that ought to change nothing: all that it brings would, if it were taken."""
    return registry.publish(
        "default", "e2e", data, record={"repeated": True}, actor="late", idempotency_key=key, **options
    )


def state(registry: Store) -> tuple[list[TaskInfo], list[AuditEntry], int]:
    return registry.tasks(), registry.audit("default"), len(registry.gc(retention_s=1e9, dry_run=True).artifacts)


@pytest.mark.parametrize("data", [DATA[0], DATA[1], DATA[3], b"junk"], ids=["same", "known", "other", "junk"])
@pytest.mark.parametrize("alias", ["production", "canary", None])
def test_a_repetition_changes_nothing_and_answers_what_was_published(
    registry: Store, data: bytes, alias: str | None
) -> None:
    first = registry.publish("default", "e2e", DATA[0], record={"bleu": 68.2}, idempotency_key="job-1")
    assert registry.inspect("default", "e2e").idempotency_keys == (IdempotencyKey("job-1", VERSIONS[0]),)
    for move in (
        lambda: None,
        lambda: publish(registry, 1),
        lambda: registry.rollback("default", "e2e"),
        lambda: registry.promote("default", "e2e", VERSIONS[1]),
    ):
        move()
        before = state(registry)
        assert repeat(registry, data, "job-1", alias=alias) == first
        assert state(registry) == before
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]


def test_a_publish_without_an_alias_is_repeated_without_one(registry: Store) -> None:
    first = registry.publish("default", "e2e", DATA[0], alias=None, record={}, idempotency_key="job-1")
    assert repeat(registry, DATA[0], "job-1") == first
    assert registry.inspect("default", "e2e").aliases == {}


def test_another_key_is_another_publish_of_content_that_is_known_too(registry: Store) -> None:
    publish(registry, 0, idempotency_key="job-1")
    publish(registry, 1, idempotency_key="job-2")
    publish(registry, 0, idempotency_key="job-3")
    task = registry.inspect("default", "e2e")
    assert [(known.key, VERSIONS.index(known.version)) for known in task.idempotency_keys] == [
        ("job-1", 0), ("job-2", 1), ("job-3", 0),
    ]  # fmt: skip
    assert [VERSIONS.index(entry.version) for entry in task.history["production"]] == [0, 1, 0]
    assert len(task.versions) == 2
    publish(registry, 0, idempotency_key="job-4")  # it moves nothing; that it was made must be known all the same
    publish(registry, 1)
    assert repeat(registry, DATA[0], "job-4").version == VERSIONS[0]
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]


def test_a_key_is_its_tasks_own(registry: Store) -> None:
    publish(registry, 0, idempotency_key="job-1")
    publish(registry, 1, name="other", idempotency_key="job-1")
    publish(registry, 2, tenant="acme", idempotency_key="job-1")
    assert [(task.name, VERSIONS.index(task.aliases["production"])) for task in registry.tasks()] == [
        ("e2e", 2), ("e2e", 0), ("other", 1),
    ]  # fmt: skip


def test_a_task_remembers_its_newest_keys(registry: Store) -> None:
    for number in range(KEYS_KEPT + 1):
        publish(registry, number % 2, idempotency_key=f"job-{number}")
    task = registry.inspect("default", "e2e")
    assert [known.key for known in task.idempotency_keys] == [f"job-{number}" for number in range(1, KEYS_KEPT + 1)]
    assert len(task.versions) == 2
    assert repeat(registry, DATA[3], "job-1").version == VERSIONS[1]
    assert registry.inspect("default", "e2e") == task
    publish(registry, 3, idempotency_key="job-0")  # forgotten
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[3]


@pytest.mark.parametrize("bad", ["", "A", "a b", "a/b", "..", "x" * 65, "é", "a\n"], ids=ascii)
def test_a_key_has_the_form_of_a_name(registry: Store, bad: str) -> None:
    with pytest.raises(InvalidName, match="publish key name: expected 1 to 64 of"):
        registry.publish("default", "e2e", DATA[0], record={}, idempotency_key=bad)
    assert registry.tasks() == []


def test_a_deleted_task_is_not_brought_back_by_a_repetition(registry: Store) -> None:
    first = registry.publish("default", "e2e", DATA[0], record={}, idempotency_key="job-1")
    registry.delete("default", "e2e")
    with pytest.raises(Conflict, match="expected a publish key that is new, got job-1") as caught:
        repeat(registry, DATA[0], "job-1")
    assert caught.value.detail == {"once": "job-1"}  # the name over HTTP
    with pytest.raises(TaskNotFound):
        registry.inspect("default", "e2e")
    publish(registry, 1)  # another task of that name has nothing to do with it either
    with pytest.raises(Conflict):
        repeat(registry, DATA[0], "job-1")
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]
    registry.delete("default", "e2e")
    registry.gc(retention_s=0)
    assert repeat(registry, DATA[0], "job-1").published_at >= first.published_at  # nothing is left that could know it


def test_a_task_that_comes_back_knows_its_keys(registry: Store, tmp_path: Path) -> None:
    first = registry.publish("default", "e2e", DATA[0], record={}, idempotency_key="job-1")
    registry.delete("default", "e2e")
    task = registry.undelete("default", "e2e")
    assert repeat(registry, DATA[1], "job-1") == first
    copy = open_registry(f"{tmp_path}/copy")
    assert copy.adopt(task, lambda version: registry.fetch("default", version))
    assert repeat(copy, DATA[1], "job-1") == first
    assert copy.inspect("default", "e2e") == registry.inspect("default", "e2e") == task


def _publish_once(index: int, url: str, published: Any) -> None:
    registry = open_registry(url)
    for number in range(5):
        data = DATA[(index + number) % 4]
        info = registry.publish("default", "e2e", data, record={f"by-{index}": number}, idempotency_key=f"job-{number}")
        published.put((number, info.version))


def assert_each_was_made_once(registry: Store, answers: list[tuple[int, str]]) -> None:
    task = registry.inspect("default", "e2e")
    assert [known.key for known in task.idempotency_keys] == [f"job-{number}" for number in range(5)]
    made = {known.key: known.version for known in task.idempotency_keys}
    assert answers
    assert {(f"job-{number}", version) for number, version in answers} == set(made.items())
    assert len(registry.audit("default")) == 5
    moves = [known.version for known in task.idempotency_keys]
    kept = [version for number, version in enumerate(moves) if number == 0 or moves[number - 1] != version]
    assert [entry.version for entry in task.history["production"]] == kept
    assert sum(len(info.record) for info in task.versions) <= 5


def test_of_several_processes_with_one_key_one_publishes(url: str) -> None:
    registry = open_registry(url)
    answers = FORK.SimpleQueue()
    assert in_processes(4, _publish_once, url, answers) == [0, 0, 0, 0]
    assert_each_was_made_once(registry, [answers.get() for _ in range(20)])


def test_of_several_threads_with_one_key_one_publishes(registry: Store) -> None:
    answers: list[tuple[int, str]] = []
    together = threading.Barrier(4)

    def run(index: int) -> None:
        for number in range(5):
            together.wait(30)
            data = DATA[(index + number) % 4]
            info = registry.publish("default", "e2e", data, record={f"by-{index}": 1}, idempotency_key=f"job-{number}")
            answers.append((number, info.version))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 20
    assert_each_was_made_once(registry, answers)


def _publish(url: str, key: str) -> None:
    open_registry(url).publish("default", "e2e", DATA[1], record={}, actor=key, idempotency_key=key)


def test_a_publish_killed_at_any_moment_and_repeated_is_made_once(registry: Store, url: str) -> None:
    publish(registry, 0)
    generator = random.Random(0)
    seen = set()
    for number in range(40):
        key = f"job-{number}"
        process = FORK.Process(target=_publish, args=(url, key))
        process.start()
        assert process.pid is not None
        time.sleep(generator.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        made = key in [known.key for known in registry.inspect("default", "e2e").idempotency_keys]
        seen.add(made)
        if made:
            registry.promote("default", "e2e", VERSIONS[0])  # somebody else's wish
        registry.publish("default", "e2e", DATA[1], record={}, actor=key, idempotency_key=key)
        assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[0 if made else 1]
        assert [entry.actor for entry in registry.audit("default")].count(key) == 1
        registry.promote("default", "e2e", VERSIONS[0])
        if number >= 8 and len(seen) == 2:
            break


def owner_of(registry: Store, method: str) -> Any:
    """What has the method: the registry, or the commands of one in Redis."""
    return registry if hasattr(registry, method) else getattr(registry, "commands", None)


@pytest.fixture
def asleep(url: str) -> Iterator[Callable[[str], Any]]:
    """A publisher of DATA[1] with the key ``job-1``, stopped as it is about to call a method, see ``owner_of``."""
    processes = []

    def start(method: str) -> Any:
        answer = FORK.SimpleQueue()

        def run() -> None:
            registry = open_registry(url)
            owner = owner_of(registry, method)
            real = getattr(owner, method)

            def stop(*args: Any, **options: Any) -> Any:
                os.kill(os.getpid(), signal.SIGSTOP)
                return real(*args, **options)

            setattr(owner, method, stop)
            answer.put(
                registry.publish(
                    "default", "e2e", DATA[1], record={"late": 1}, actor="late", idempotency_key="job-1"
                )
            )

        process = FORK.Process(target=run)
        process.start()
        processes.append(process)
        assert process.pid is not None
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        return process, answer

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("method", ["_writing", "commit"])
def test_a_publisher_that_was_stopped_and_wakes_up_finds_its_work_done(
    registry: Store, url: str, asleep: Callable[[str], Any], method: str
) -> None:
    """A job's worker is stopped, another takes over and publishes, somebody rolls back; then the first one wakes."""
    if owner_of(registry, method) is None:
        pytest.skip("a writer on disk holds the lock there, and nobody else publishes")
    publish(registry, 0)
    process, answer = asleep(method)
    first = registry.publish("default", "e2e", DATA[2], record={}, idempotency_key="job-1")
    registry.rollback("default", "e2e")
    task, audit = registry.inspect("default", "e2e"), registry.audit("default")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 0
    assert answer.get() == first
    assert registry.inspect("default", "e2e") == task
    assert registry.audit("default") == audit
