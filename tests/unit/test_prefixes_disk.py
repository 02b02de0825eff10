"""The disk registry under failing disks, killed writers, damaged files and hostile folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import version_of, write_prefix
from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry import default_registry_url, open_registry, registry_path
from prefixes.registry.base import TaskInfo
from prefixes.registry.disk import DiskRegistry
from prefixes.spec import TaskRef
from tests.support.prefixes import make_prefix

PREFIXES = [make_prefix(seed=seed) for seed in range(3)]
DATA = [write_prefix(prefix) for prefix in PREFIXES]
VERSIONS = [version_of(prefix) for prefix in PREFIXES]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def publish(registry: DiskRegistry, index: int, name: str = "e2e", tenant: str = "default") -> None:
    registry.publish(tenant, name, DATA[index], record={})


def age(root: Path) -> None:
    """Make every file old enough to be cached."""
    for path in root.rglob("*.json"):
        os.utime(path, (time.time() - 100, time.time() - 100))


OPERATIONS: dict[str, Callable[[DiskRegistry], object]] = {
    "first publish": lambda registry: publish(registry, 2, "new", "fresh"),
    "publish": lambda registry: publish(registry, 2),
    "promote": lambda registry: registry.promote("default", "e2e", VERSIONS[0]),
    "rollback": lambda registry: registry.rollback("default", "e2e"),
    "delete": lambda registry: registry.delete("default", "e2e"),
}


def state(root: Path) -> list[TaskInfo]:
    """What a fresh reader sees; every artifact that it lists can be fetched, none that it does not."""
    registry = DiskRegistry(root, create=False)
    tasks = registry.tasks()
    listed = {(task.tenant, info.version) for task in tasks for info in task.versions}
    for tenant in ("default", "fresh"):
        for version, data in zip(VERSIONS, DATA, strict=True):
            if (tenant, version) in listed:
                assert registry.fetch(tenant, version) == data
            else:
                with pytest.raises(TaskNotFound):
                    registry.fetch(tenant, version)
    return tasks


def shape(tasks: list[TaskInfo]) -> list[object]:
    """Everything but times."""
    return [
        (
            task.tenant,
            task.name,
            task.aliases,
            {alias: [(entry.version, entry.action) for entry in entries] for alias, entries in task.history.items()},
            sorted(info.version for info in task.versions),
        )
        for task in tasks
    ]


def prepare(root: Path) -> DiskRegistry:
    registry = DiskRegistry(root)
    publish(registry, 0)
    publish(registry, 1)
    return registry


def outcome(root: Path, operation: str) -> list[object]:
    """What the operation gives when nothing fails."""
    registry = prepare(root)
    OPERATIONS[operation](registry)
    return shape(state(root))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("call", ["replace", "fsync", "open", "mkdir", "unlink"])
def test_a_failing_disk_leaves_the_state_before_or_after(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, call: str
) -> None:
    after = outcome(tmp_path / "oracle", operation)
    real = getattr(os, call)
    for failing in range(100):
        registry = prepare(tmp_path / str(failing))
        before = state(registry._files.root)
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
        assert not list(tmp_path.joinpath(str(failing)).rglob(".tmp-*")) or call == "unlink"
        found = shape(state(registry._files.root))
        assert found in (shape(before), after)
        if not failed:
            assert found == after
        if count <= failing:
            return
        if found != after:  # and once the disk is well again, the same call succeeds
            OPERATIONS[operation](registry)
            assert shape(state(registry._files.root)) == after
    pytest.fail("the operation never got through")


def _killed(root: Path, operation: str, nth: int) -> None:
    """Do the operation and die at its ``nth`` system call that changes the disk."""
    registry = DiskRegistry(root)
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in ("replace", "fsync", "mkdir", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    OPERATIONS[operation](registry)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_writer_killed_at_any_system_call_leaves_the_state_before_or_after(
    root: Path, tmp_path: Path, operation: str
) -> None:
    after = outcome(tmp_path / "oracle", operation)
    seen = []
    for nth in range(100):
        folder = tmp_path / str(nth)
        before = shape(state(prepare(folder)._files.root))
        process = FORK.Process(target=_killed, args=(folder, operation, nth))
        process.start()
        process.join(30)
        found = shape(state(folder))
        assert found in (before, after)
        seen.append(found)
        if process.exitcode == 0:
            assert found == after
            break
        assert process.exitcode == -signal.SIGKILL
        registry = DiskRegistry(folder)
        if found != after:
            OPERATIONS[operation](registry)
            assert shape(state(folder)) == after
        else:
            publish(registry, 1, "other")
        assert not [path for path in folder.rglob(".tmp-*") if path.parent != folder]
    assert before in seen


def test_a_killed_publishers_orphan_is_collected_with_the_next_delete(root: Path) -> None:
    registry = prepare(root)
    orphan = root / "tenants/default/blobs" / f"{VERSIONS[2].removeprefix('sha256:')}.safetensors"
    orphan.write_bytes(DATA[2])
    with pytest.raises(TaskNotFound):
        registry.fetch("default", VERSIONS[2])
    publish(registry, 0, "other")
    registry.delete("default", "e2e")
    assert [path.name for path in orphan.parent.iterdir()] == [f"{VERSIONS[0].removeprefix('sha256:')}.safetensors"]


def test_publishing_again_mends_a_damaged_artifact(root: Path) -> None:
    registry = prepare(root)
    blob = root / "tenants/default/blobs" / f"{VERSIONS[0].removeprefix('sha256:')}.safetensors"
    blob.write_bytes(b"rot")
    assert registry.fetch("default", VERSIONS[0]) == b"rot"  # the reader compares the digest, not the store
    publish(registry, 0)
    assert registry.fetch("default", VERSIONS[0]) == DATA[0]


def test_an_indexed_but_missing_artifact_is_the_registrys_fault(root: Path) -> None:
    registry = prepare(root)
    (root / "tenants/default/blobs" / f"{VERSIONS[0].removeprefix('sha256:')}.safetensors").unlink()
    with pytest.raises(RegistryUnavailable, match="indexed, but its artifact is missing"):
        registry.fetch("default", VERSIONS[0])


INDEX = "tenants/default/tasks/e2e.json"


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((root / INDEX).read_text())
    change(raw)
    (root / INDEX).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / INDEX).write_text("{"),
        lambda root: (root / INDEX).write_text("[]"),
        lambda root: (root / INDEX).write_text("[" * 100_000),
        lambda root: (root / INDEX).write_bytes(b"\xff"),
        lambda root: edit(root, lambda raw: raw.update(format=2)),
        lambda root: edit(root, lambda raw: raw.update(task="default/other")),
        lambda root: edit(root, lambda raw: raw.update(task="../../x")),
        lambda root: edit(root, lambda raw: raw.pop("versions")),
        lambda root: edit(root, lambda raw: raw.update(versions=[])),
        lambda root: edit(root, lambda raw: raw["aliases"].update(production=VERSIONS[0])),
        lambda root: edit(root, lambda raw: raw["history"]["production"].pop()),
        lambda root: edit(root, lambda raw: raw["history"].update(production=[])),
        lambda root: edit(root, lambda raw: raw["history"]["production"][0].update(action="rollback")),
        lambda root: edit(root, lambda raw: raw["versions"][0]["spec"].update(template="x")),
        lambda root: edit(root, lambda raw: raw["versions"][0].update(size="big")),
        lambda root: ((root / INDEX).unlink(), (root / INDEX).mkdir()),
    ],
)
def test_a_damaged_index_is_unavailable_for_its_tenant_alone(root: Path, damage: Callable[[Path], object]) -> None:
    registry = prepare(root)
    publish(registry, 2, tenant="globex")
    damage(root)
    for call in (
        lambda: registry.resolve(TaskRef.parse("e2e")),
        lambda: registry.tasks("default"),
        lambda: registry.fetch("default", VERSIONS[0]),
        lambda: publish(registry, 1),
    ):
        with pytest.raises(RegistryUnavailable, match="tenants/default") as caught:
            call()
        assert str(root) not in caught.value.message
    assert registry.fetch("globex", VERSIONS[2]) == DATA[2]
    assert len(registry.tasks("globex")) == 1


@pytest.mark.parametrize(
    "link", ["tenants", "tenants/default", "tenants/default/blobs", "tenants/default/tasks", INDEX]
)
def test_symbolic_links_are_refused(root: Path, tmp_path: Path, link: str) -> None:
    registry = prepare(root)
    (root / link).rename(tmp_path / "elsewhere")
    (root / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryUnavailable, match="symbolic link"):
        registry.fetch("default", VERSIONS[0])
    with pytest.raises(RegistryUnavailable, match="symbolic link"):
        publish(registry, 2)


def test_the_root_itself_may_be_a_symbolic_link(root: Path, tmp_path: Path) -> None:
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    publish(DiskRegistry(tmp_path / "link"), 0)
    assert DiskRegistry(root, create=False).fetch("default", VERSIONS[0]) == DATA[0]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RegistryUnavailable, match=r"expected an empty folder or a registry, found thesis\.tex"):
        DiskRegistry(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_without_create_a_missing_registry_is_an_error_and_stays_missing(root: Path) -> None:
    with pytest.raises(RegistryUnavailable, match=r"expected a registry\.json"):
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
