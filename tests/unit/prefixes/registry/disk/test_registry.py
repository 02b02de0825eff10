"""The disk registry's folder: what it costs to read, what is cached, clean-up, waiting writers, URLs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixes.errors import PrefixdError, RegistryMissing, RegistryUnavailable, TaskNotFound
from prefixes.registry import default_registry_url, open_registry, registry_path
from prefixes.registry.disk.registry import DiskRegistry
from prefixes.spec import TaskRef
from tests.support.disk import (
    AUDIT,
    DATA,
    INDEX,
    LAST,
    VERSIONS,
    blob,
    bring,
    digits,
    elsewhere,
    prepare,
    publish,
    see,
    watched,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def age(root: Path) -> None:
    """Make every file old enough to be cached."""
    for path in root.rglob("*.json"):
        os.utime(path, (time.time() - 100, time.time() - 100))


def test_a_killed_publishers_orphan_is_the_clean_ups_to_take_and_no_strangers(root: Path) -> None:
    registry = prepare(root)
    (root / blob(2)).rename(root / "saved")
    registry.gc(retention_s=0)
    (root / "saved").rename(root / blob(2))
    (root / "tenants/default/blobs/notes.txt").write_text("mine")
    with pytest.raises(TaskNotFound):
        registry.fetch("default", VERSIONS[2])
    looked = registry.gc(dry_run=True)
    assert (root / blob(2)).exists()
    assert registry.gc() == looked
    assert (looked.tasks, looked.artifacts, looked.freed_bytes) == ((), (f"default/{VERSIONS[2]}",), len(DATA[2]))
    assert sorted(path.name for path in (root / "tenants/default/blobs").iterdir()) == sorted(
        [Path(blob(0)).name, Path(blob(1)).name, "notes.txt"]
    )


def test_the_clean_up_leaves_no_trace_of_what_it_takes_but_in_the_audit(root: Path) -> None:
    registry = prepare(root)
    assert (root / "tenants/default/references" / digits(2)).is_dir()
    assert registry.gc().tasks == ()  # its retention is not over
    report = registry.gc(retention_s=0, actor="ci")
    assert (report.tasks, report.artifacts, report.freed_bytes) == (
        ("default/old",), (f"default/{VERSIONS[2]}",), len(DATA[2]),
    )  # fmt: skip
    left = [path for path in root.rglob("*") if digits(2) in path.name or path.name.startswith("old")]
    assert left == []
    assert (registry.audit("default")[0].action, registry.audit("default")[0].task) == ("purge", "default/old")
    assert registry.gc(retention_s=0) == type(report)((), (), 0)
    publish(registry, 2, "old")
    assert registry.fetch("default", VERSIONS[2]) == DATA[2]


def test_a_registry_from_before_references_and_the_audit_is_read_and_written(root: Path) -> None:
    registry = prepare(root)
    registry.gc(retention_s=0)
    folder = root / "tenants/default"
    shutil.rmtree(folder / "references")
    shutil.rmtree(folder / "deleted")
    (root / AUDIT).unlink()
    (root / LAST).unlink()
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]
    assert registry.audit("default") == []
    registry.rollback("default", "e2e")
    registry.adopt(elsewhere("e2e", 2), bring, replace=True)
    registry.delete("default", "e2e")
    registry.undelete("default", "e2e")
    assert [entry.action for entry in registry.audit("default")] == ["undelete", "delete", "copy", "rollback"]
    assert see(root).audit["default"]


def counted(call: Callable[[DiskRegistry], object], registry: DiskRegistry) -> int:
    """How often the call touches the file system, by whatever function."""
    touched: list[Path] = []
    with watched(lambda name, path: touched.append(path)):
        call(registry)
    return len(touched)


def refused(error: type[PrefixdError], call: Callable[[], object]) -> None:
    with pytest.raises(error):
        call()


def test_no_read_costs_more_with_more_tasks(root: Path) -> None:
    """Whether an index is cached or not; a digest that the tenant has not got included."""
    registry = prepare(root)
    publish(registry, 2, tenant="globex")
    registry.delete("globex", "e2e")
    calls: dict[str, Callable[[DiskRegistry], object]] = {
        "resolve": lambda registry: registry.resolve(TaskRef.parse("e2e")),
        "fetch": lambda registry: registry.fetch("default", VERSIONS[0]),
        "fetch of a deleted task": lambda registry: registry.fetch("default", VERSIONS[2]),
        "no such digest": lambda registry: refused(
            TaskNotFound, lambda: registry.fetch("default", "sha256:" + "0" * 64)
        ),
        "no such task": lambda registry: refused(TaskNotFound, lambda: registry.resolve(TaskRef.parse("nothing"))),
    }
    counts = []
    text = (root / INDEX).read_text()
    for number in (10, 300):
        for made in range(number):
            (root / INDEX).with_name(f"task-{made}.json").write_text(text.replace("/e2e", f"/task-{made}"))
        age(root)
        fresh, warm = DiskRegistry(root), DiskRegistry(root)
        for call in calls.values():
            call(warm)
        assert len(warm.tasks("default")) == number + 1  # or this proves nothing; and all are cached now
        counts.append({name: (counted(call, fresh), counted(call, warm)) for name, call in calls.items()})
    assert counts[0] == counts[1]
    assert all(0 < count < 100 for both in counts[0].values() for count in both)


def test_publishing_again_mends_a_damaged_artifact(root: Path) -> None:
    registry = prepare(root)
    (root / blob(0)).write_bytes(b"rot")
    assert registry.fetch("default", VERSIONS[0]) == b"rot"  # the reader compares the digest, not the store
    publish(registry, 0)
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]


def test_an_indexed_but_missing_artifact_is_the_registrys_fault(root: Path) -> None:
    registry = prepare(root)
    (root / blob(0)).unlink()
    with pytest.raises(RegistryUnavailable, match="indexed, but its artifact is missing"):
        registry.fetch("default", VERSIONS[0])


def test_the_audit_leaves_out_lines_that_are_none(root: Path) -> None:
    registry = prepare(root)
    lines = (root / AUDIT).read_bytes().splitlines()
    junk = [b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b"7", b""]
    (root / AUDIT).write_bytes(b"\n".join([*junk, lines[0], *junk, *lines[1:]]) + b"\n")
    assert [entry.action for entry in registry.audit("default")] == ["delete", "publish", "publish", "publish"]


@pytest.mark.parametrize("moment", ["_last_change", "_lines"])
def test_the_audit_is_whole_when_writers_go_on_while_it_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Two changes of other tasks, just before or after a reader's look at the last one: no entry twice, and no gap."""
    reader, writer = prepare(root), DiskRegistry(root)
    log = reader._log
    real = getattr(log, moment)
    looks = 0

    def look(tenant: str) -> object:
        nonlocal looks
        looks += 1
        if looks == 1:
            found = real(tenant) if moment == "_last_change" else None
            publish(writer, 0, "other")
            publish(writer, 1, "third")
            return found if moment == "_last_change" else real(tenant)
        return real(tenant)

    monkeypatch.setattr(log, moment, look)
    assert [(entry.action, entry.task) for entry in reader.audit("default")] == [
        ("publish", "default/third"),
        ("publish", "default/other"),
        ("delete", "default/old"),
        ("publish", "default/old"),
        ("publish", "default/e2e"),
        ("publish", "default/e2e"),
    ]
    assert looks > 1


def test_without_create_a_missing_registry_is_an_error_and_stays_missing(root: Path) -> None:
    with pytest.raises(RegistryMissing, match=r"expected a registry\.json"):
        open_registry(str(root), create=False)
    assert not root.exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 9, "id": "x"}'])
def test_a_damaged_registry_file_is_unavailable(root: Path, content: str) -> None:
    registry = prepare(root)
    (root / "registry.json").write_text(content)
    with pytest.raises(RegistryUnavailable):
        registry.check()


def test_another_registry_put_in_its_place_is_noticed(root: Path) -> None:
    registry = prepare(root)
    root.rename(root.with_name("old"))
    DiskRegistry(root)
    with pytest.raises(RegistryUnavailable, match="another registry"):
        registry.check()


def test_a_writer_that_hangs_is_an_error_in_time_and_readers_do_not_wait(root: Path) -> None:
    registry = prepare(root)
    impatient = DiskRegistry(root, lock_timeout_s=0.1)
    with registry._files.lock("tenants", "default"):
        with pytest.raises(RegistryUnavailable, match="another writer holds it"):
            publish(impatient, 2)
        assert impatient.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]
        publish(impatient, 2, tenant="globex")


def test_a_cached_index_is_read_again_after_every_change(root: Path) -> None:
    reader, writer = DiskRegistry(root), DiskRegistry(root)
    publish(writer, 0)
    age(root)
    reader.resolve(TaskRef.parse("e2e"))
    assert reader.inspect("default", "e2e") is reader.inspect("default", "e2e")  # cached, or this proves nothing
    publish(writer, 1)
    assert reader.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]
    writer.delete("default", "e2e")
    with pytest.raises(TaskNotFound):
        reader.resolve(TaskRef.parse("e2e"))


def test_a_change_within_the_clocks_resolution_is_seen(root: Path) -> None:
    """Same inode, same size, same time: an index read while it is that young must not be kept."""
    registry = prepare(root)
    stamp = time.time_ns()
    os.utime(root / INDEX, ns=(stamp, stamp))
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]
    text = (root / INDEX).read_text()
    swapped = text.replace(VERSIONS[0], "?" * 71).replace(VERSIONS[1], VERSIONS[0]).replace("?" * 71, VERSIONS[1])
    with (root / INDEX).open("r+") as file:
        file.write(swapped)
    os.utime(root / INDEX, ns=(stamp, stamp))
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[0]


def test_strangers_among_the_folders_are_ignored(root: Path) -> None:
    registry = prepare(root)
    (root / "tenants/lost+found").mkdir()
    (root / "tenants/default/tasks/.tmp-0123").write_text("half")
    (root / "tenants/default/tasks/Notes.json").write_text("mine")
    assert [task.name for task in registry.tasks()] == ["e2e"]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("disk:///a/b", "/a/b"),
        ("disk:a/b", "a/b"),
        ("disk:/a/b", "/a/b"),
        ("disk:///a%20b/%3F", "/a b/?"),
        ("/a/b", "/a/b"),
        ("a/b", "a/b"),
        ("./a:b", "a:b"),
        ("disk:~/x", str(Path.home() / "x")),
    ],
)
def test_registry_urls(url: str, path: str) -> None:
    assert registry_path(url) == Path(path)


def test_the_default_registry_is_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "a b?"))
    assert registry_path(default_registry_url()) == tmp_path / "a b?/prefixd/registry"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry_path(default_registry_url()) == tmp_path / ".local/share/prefixd/registry"
