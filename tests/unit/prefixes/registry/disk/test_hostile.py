"""The disk registry in damaged, forged and hostile folders: named errors, and nothing outside is read or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import RegistryUnavailable, TaskNotFound
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
    clean,
    digits,
    elsewhere,
    prepare,
    publish,
    watched,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def deleted_file(root: Path) -> str:
    """Where the deleted task of ``prepare`` lies."""
    (path,) = (root / "tenants/default/deleted").iterdir()
    return str(path.relative_to(root))


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
        lambda root: edit(root, lambda raw: raw.update(once=None)),
        lambda root: edit(root, lambda raw: raw.update(once=[{"key": "job"}])),
        lambda root: edit(root, lambda raw: raw.update(once=[{"key": "../job", "version": VERSIONS[0]}])),
        lambda root: edit(root, lambda raw: raw.update(once=[{"key": "job", "version": VERSIONS[2]}])),
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


FOLDERS = ["tenants", "tenants/default", *(f"tenants/default/{name}" for name in ("blobs", "tasks", "deleted"))]
WRITES: dict[str, Callable[[DiskRegistry], object]] = {
    "publish": lambda registry: publish(registry, 2),
    "delete": lambda registry: registry.delete("default", "e2e"),
    "undelete": lambda registry: registry.undelete("default", "old"),
    "adopt": lambda registry: registry.adopt(elsewhere("e2e", 2), bring, replace=True),
    "gc": clean,
}
READS: dict[str, Callable[[DiskRegistry], object]] = {
    "resolve": lambda registry: registry.resolve(TaskRef.parse("e2e")),
    "fetch": lambda registry: registry.fetch("default", VERSIONS[0]),
    "tasks": lambda registry: registry.tasks(),
    "deleted": lambda registry: registry.deleted(),
    "audit": lambda registry: registry.audit("default"),
}
LINKS: dict[str, tuple[Callable[[Path], str], set[str]]] = {
    **{folder: (lambda root, folder=folder: folder, set(WRITES)) for folder in FOLDERS},  # type: ignore[misc]
    "the audit": (lambda root: AUDIT, {*WRITES, "audit"}),
    "the last change": (lambda root: LAST, {*WRITES, "audit", "deleted"}),
    "the lock": (lambda root: "tenants/default/.lock", set(WRITES)),
    "references": (lambda root: "tenants/default/references", {*WRITES, "fetch"}),
    "an index": (lambda root: INDEX, {"publish", "delete", "adopt", "gc", "resolve", "fetch", "tasks"}),
    "a deleted task": (deleted_file, {"undelete", "gc", "deleted"}),
    "an artifact": (lambda root: blob(0), {"fetch"}),
    "a version's references": (
        lambda root: f"tenants/default/references/{digits(0)}", {"delete", "adopt", "fetch"},
    ),
    "a reference": (lambda root: f"tenants/default/references/{digits(0)}/e2e", set()),
}  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_symbolic_links_are_refused_and_nothing_outside_is_touched(root: Path, tmp_path: Path, link: str) -> None:
    prepare(root)
    place, expected = LINKS[link]
    path, outside = root / place(root), tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    kept = {inner: inner.read_bytes() for inner in [outside, *outside.rglob("*")] if inner.is_file()}
    reached: list[str] = []

    def look(function: str, place: Path) -> None:
        """A link itself may be looked at, to refuse it, or removed; where it leads nothing is, not even looked at."""
        if place.is_relative_to(outside):
            reached.append(f"{function} {place}")

    refused_ones = set()
    for name, call in {**READS, **WRITES}.items():
        with watched(look):
            try:
                call(DiskRegistry(root))
            except RegistryUnavailable as error:
                assert "symbolic link" in error.message, name
                assert str(tmp_path) not in error.message
                refused_ones.add(name)
            except TaskNotFound:
                pass  # undone by an operation that the link does not concern
    assert expected <= refused_ones
    assert reached == []
    assert {inner: inner.read_bytes() for inner in kept} == kept
    assert {inner for inner in outside.rglob("*") if inner.is_file()} <= set(kept)


VICTIMS: dict[str, list[Any]] = {
    "outside": ["..", "victim"],
    "outside, from within": ["tenants", "default", "references", "..", "..", "..", "..", "victim"],
    "an absolute path": ["ABSOLUTE"],
    "another tenant's": ["tenants", "globex", "tasks", "e2e.json"],
    "another tenant's, deleted": ["tenants", "globex", "deleted", "e2e.json"],
    "a task": ["tenants", "default", "tasks", "e2e.json"],
    "an artifact": ["tenants", "default", "blobs", Path(blob(0)).name],
    "the audit": ["tenants", "default", "audit.jsonl"],
    "the registry's id": ["registry.json"],
    "up within a part": ["tenants", "default", "deleted", "../tasks/e2e.json"],
    "a part that is all": ["tenants", "default", "references", "x", ".."],
    "nothing": [],
    "no parts": ["tenants", "default", "deleted", 7],
    "a null": ["tenants", "default", "deleted", "a\0b"],
}


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("made", [True, False])
def test_a_forged_last_change_removes_nothing_but_what_changes_remove(
    root: Path, tmp_path: Path, victim: str, made: bool
) -> None:
    registry = prepare(root)
    publish(registry, 2, tenant="globex")
    (tmp_path / "victim").write_text("precious")
    parts = [str(tmp_path / "victim") if part == "ABSOLUTE" else part for part in VICTIMS[victim]]
    raw = json.loads((root / LAST).read_text())
    raw["line"]["id"] = "forged"
    raw.update(remove_if_made=[parts], remove_if_not=[parts], after=None, name="nothing" if made else "e2e")
    (root / LAST).write_text(json.dumps(raw))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for call in (*WRITES.values(), READS["audit"], READS["deleted"]):
        with pytest.raises(RegistryUnavailable, match=r"last-change\.json: ValueError: expected"):
            call(registry)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert registry.fetch("default", VERSIONS[1]) == DATA[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: "{",
        lambda raw: "[]",
        lambda raw: "[" * 100_000,
        lambda raw: json.dumps({**raw, "name": "../../../victim"}),
        lambda raw: json.dumps({**raw, "name": 7}),
        lambda raw: json.dumps({**raw, "line": {}}),
        lambda raw: json.dumps({**raw, "line": {**raw["line"], "actor": 7}}),
        lambda raw: json.dumps({**raw, "remove_if_made": "tenants"}),
        lambda raw: json.dumps({key: value for key, value in raw.items() if key != "after"}),
    ],
)
def test_a_damaged_last_change_stops_its_tenants_writers_alone(root: Path, change: Callable[[Any], str]) -> None:
    registry = prepare(root)
    (root / LAST).write_text(change(json.loads((root / LAST).read_text())))
    with pytest.raises(RegistryUnavailable, match=r"tenants/default/last-change\.json") as caught:
        publish(registry, 2)
    assert str(root) not in caught.value.message
    assert registry.resolve(TaskRef.parse("e2e")).version == VERSIONS[1]
    publish(registry, 2, tenant="globex")


def test_the_time_of_a_deleted_task_has_a_zone(root: Path) -> None:
    registry = prepare(root)
    path = root / deleted_file(root)
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "deleted_at": raw["deleted_at"].removesuffix("Z")}))
    assert "expected a time with its zone" in registry.gc().failed[0]


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
