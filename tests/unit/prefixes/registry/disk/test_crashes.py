"""The disk registry under failing disks and killed writers: tasks, deleted ones and the audit stay in step.

Every operation is done with each of its system calls failing, or being its last. What is seen then, by a fresh reader
and after the next writer alike, is the state before or the state after, with exactly one entry in the audit for a
change that is visible and none for one that is not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.registry.disk.registry import DiskRegistry
from prefixes.registry.quota import kept_by
from tests.support.disk import AUDIT, DATA, INDEX, LAST, VERSIONS, Seen, bring, clean, elsewhere, prepare, publish, see

FORK = multiprocessing.get_context("fork")

OPERATIONS: dict[str, Callable[[DiskRegistry], object]] = {
    "first publish": lambda registry: publish(registry, 2, "new", "fresh"),
    "publish": lambda registry: publish(registry, 2),
    "publish with a key": lambda registry: registry.publish(
        "default", "e2e", DATA[2], record={}, actor="ci", idempotency_key="job"
    ),
    "promote": lambda registry: registry.promote("default", "e2e", VERSIONS[0], actor="ci"),
    "rollback": lambda registry: registry.rollback("default", "e2e", actor="ci"),
    "delete": lambda registry: registry.delete("default", "e2e", actor="ci"),
    "delete a version": lambda registry: registry.delete_version("default", "e2e", VERSIONS[0], actor="ci"),
    "undelete": lambda registry: registry.undelete("default", "old", actor="ci"),
    "adopt": lambda registry: registry.adopt(elsewhere("taken", 0, 2), bring, actor="ci"),
    "adopt with replace": lambda registry: registry.adopt(elsewhere("e2e", 2, 0), bring, replace=True, actor="ci"),
    "gc": clean,
}
ENTRIES = {operation: "fresh" if operation == "first publish" else "default" for operation in OPERATIONS}
REACHABLE = {"gc": {VERSIONS[2]}}
"""A purge is made when it is announced; until it is carried out, rows that were admitted before may still load."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared") / "registry"
    prepare(root)
    return root


def copy(prepared: Path, target: Path) -> DiskRegistry:
    return DiskRegistry(shutil.copytree(prepared, target))


def outcome(prepared: Path, root: Path, operation: str) -> tuple[Seen, Seen]:
    """What is seen before the operation, and after it when nothing fails: one more entry."""
    registry = copy(prepared, root)
    before = see(root)
    OPERATIONS[operation](registry)
    after = see(root)
    tenant = ENTRIES[operation]
    assert after.audit[tenant][1:] == before.audit[tenant]
    assert (after.tasks, after.deleted) != (before.tasks, before.deleted)
    return before, after


def write_next(root: Path) -> None:
    """What the next writer of each tenant does before its own change; it leaves nothing half-done."""
    registry = DiskRegistry(root)
    for tenant in [path.name for path in (root / "tenants").iterdir()]:
        with registry._writing(tenant):
            pass
        last = root / "tenants" / tenant / "last-change.json"
        if last.exists():
            lines = (root / "tenants" / tenant / "audit.jsonl").read_text().splitlines()
            assert json.loads(lines[-1]) == json.loads(last.read_text())["line"]


def check_total(root: Path) -> None:
    """What is noted of how much a tenant has is what it has."""
    registry = DiskRegistry(root)
    for tenant in registry.tenants():
        assert registry._kept(tenant) == kept_by(registry.tasks(tenant), registry.deleted(tenant))


def check_in_step(root: Path, operation: str, before: Seen, after: Seen) -> bool:
    """The state is the one before or the one after, and stays so when the next writer has been; whether it was made."""
    found = see(root, reachable=REACHABLE.get(operation, frozenset()))
    assert found in (before, after)
    check_total(root)
    write_next(root)
    assert see(root) == found
    if found != after:
        OPERATIONS[operation](DiskRegistry(root))
        assert see(root) == after
    assert not [path for path in root.rglob(".tmp-*") if path.parent != root]
    return found == after


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("call", ["replace", "fsync", "open", "write", "mkdir", "unlink"])
def test_a_failing_disk_leaves_the_state_before_or_after(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, call: str
) -> None:
    before, after = outcome(prepared, tmp_path / "oracle", operation)
    real = getattr(os, call)
    for failing in range(400):
        registry = copy(prepared, tmp_path / str(failing))
        count = 0

        def fail(*args: Any, nth: int = failing, **options: Any) -> Any:
            nonlocal count
            if str(args[0]).startswith("/proc") or str(args[0]).endswith(".lock"):
                return real(*args, **options)
            count += 1
            if count == nth + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                OPERATIONS[operation](registry)
                failed = False
            except RegistryUnavailable as error:
                failed = True
                assert "No space left" in error.message
                assert str(tmp_path) not in error.message
        assert check_in_step(tmp_path / str(failing), operation, before, after) or failed
        if count <= failing:
            return
    pytest.fail("the operation never got through")


DYING = ("open", "write", "replace", "fsync", "mkdir", "unlink", "rmdir")


def _killed(root: Path, operation: str, nth: int) -> None:
    """Do the operation and die before its ``nth`` system call that changes the disk."""
    registry = DiskRegistry(root)
    count = 0

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += name != "open" or bool(args[1] & os.O_CREAT)
            if count == nth + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in DYING:
        setattr(os, name, dying(name, getattr(os, name)))
    OPERATIONS[operation](registry)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_writer_killed_at_any_system_call_leaves_the_state_before_or_after(
    prepared: Path, tmp_path: Path, operation: str
) -> None:
    before, after = outcome(prepared, tmp_path / "oracle", operation)
    made = []
    for nth in range(200):
        folder = tmp_path / str(nth)
        copy(prepared, folder)
        process = FORK.Process(target=_killed, args=(folder, operation, nth))
        process.start()
        process.join(30)
        assert process.exitcode in (0, -signal.SIGKILL)
        made.append(check_in_step(folder, operation, before, after))
        if process.exitcode == 0:
            break
    assert made[-1]
    assert made == sorted(made)  # one moment at which it is made
    assert not made[0]
    assert sum(made) > 1, "no writer was killed after the change was made and before its entry was written"


def _append_to_a_full_disk(root: Path, room: int) -> None:
    """Promote where files may not grow past the audit and ``room`` bytes: its line is torn."""
    registry = DiskRegistry(root)
    limit = (root / AUDIT).stat().st_size + room
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(RegistryUnavailable, match=r"cannot write tenants/default/audit\.jsonl"):
        registry.promote("default", "e2e", VERSIONS[0], actor="ci")


def test_a_torn_last_line_of_the_audit_is_no_entry_and_harms_no_other(prepared: Path, tmp_path: Path) -> None:
    """The system itself writes a part of the line: at its beginning, in its middle, all but its end."""
    before, after = outcome(prepared, tmp_path / "oracle", "promote")
    line = (tmp_path / "oracle" / AUDIT).read_bytes().splitlines()[-1]
    for room in (1, len(line) // 2, len(line) - 1, len(line)):
        root = tmp_path / str(room)
        copy(prepared, root)
        lines = (root / AUDIT).read_bytes()
        first = lines.splitlines(keepends=True)[0]
        (root / AUDIT).write_bytes(first * 200 + lines)  # longer than any other file that is written
        process = FORK.Process(target=_append_to_a_full_disk, args=(root, room))
        process.start()
        process.join(30)
        assert process.exitcode == 0
        torn = (root / AUDIT).read_bytes()
        assert len(torn) == len(first) * 200 + len(lines) + room  # or this proves nothing
        found = see(root)
        assert (found.tasks, found.audit["default"][0]) == (after.tasks, after.audit["default"][0])
        assert found.audit["default"][1 : len(before.audit["default"]) + 1] == before.audit["default"]
        for _ in range(2):
            write_next(root)
            assert see(root) == found
        publish(DiskRegistry(root), 2)
        again = DiskRegistry(root).audit("default", limit=3)
        assert [entry.action for entry in again] == ["publish", "promote", "delete"]
        assert (root / AUDIT).read_bytes().startswith(torn + b"\n")


def test_a_change_that_did_not_happen_is_forgotten(prepared: Path, tmp_path: Path) -> None:
    """The announcement of a killed writer is not taken for a later change to the same state."""
    root = tmp_path / "registry"
    registry = copy(prepared, root)
    index = (root / INDEX).read_bytes()
    registry.promote("default", "e2e", VERSIONS[0], actor="first")
    announced = (root / LAST).read_bytes()
    for path in (root, tmp_path / "other"):
        shutil.rmtree(path, ignore_errors=True)
    registry = copy(prepared, root)
    (root / LAST).write_bytes(announced)
    assert (root / INDEX).read_bytes() == index
    registry.rollback("default", "e2e", actor="second")
    assert [entry.actor for entry in registry.audit("default", limit=2)] == ["second", "ci"]
    assert "first" not in (root / AUDIT).read_text()
