"""An open folder: no link and no path leads out of it; modes, missing folders and left-overs are as callers say."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefixes.files import write_bytes, write_folder, write_json, write_new
from prefixes.files.folder import TEMPORARY, Folder, LeadsElsewhere
from tests.support.files import NEW, OLD, content, old_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an old file."""
    return old_file(tmp_path / "place")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing may touch."""
    made = old_file(tmp_path / "outside")
    before = made.stat().st_mtime_ns
    yield made
    assert content(made) == {"file": OLD}
    assert made.stat().st_mtime_ns == before


def test_a_link_in_a_folders_place_is_not_followed(place: Path, outside: Path) -> None:
    (place / "link").symlink_to(outside)
    with Folder.at(place) as folder:
        for make in (None, 0o777):
            with pytest.raises(LeadsElsewhere, match="symbolic link"):
                folder.folder("link", make=make)
        with pytest.raises(NotADirectoryError):
            folder.folder("file")
    with pytest.raises(LeadsElsewhere):
        Folder.at(place / "link", follow=False)
    with Folder.at(place / "link") as folder:  # the caller's own path may have one
        assert [entry.name for entry in folder.entries()] == ["file"]
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        write_folder(place / "link", {"file": NEW})


def test_a_link_in_a_files_place_is_not_followed(place: Path, outside: Path) -> None:
    (place / "link").symlink_to(outside / "file")
    (place / "dangling").symlink_to(outside / "none")
    with Folder.at(place) as folder:
        calls: list[Callable[[str], object]] = [folder.open, folder.append, folder.status, folder.touch]
        for name in ("link", "dangling"):
            for call in calls:
                with pytest.raises(LeadsElsewhere, match="symbolic link"):
                    call(name)
            with pytest.raises(FileExistsError):
                folder.create(name)
            with pytest.raises(FileExistsError):
                write_new(place / name, NEW)
        folder.write("link", NEW)  # takes the link's place
        folder.remove("dangling")
    assert content(place) == {"file": OLD, "link": NEW}
    assert not (place / "link").is_symlink() and not (place / "dangling").is_symlink()


def test_a_folder_exchanged_for_a_link_once_it_is_open_leads_nowhere_else(place: Path, outside: Path) -> None:
    with Folder.at(place) as folder:
        moved = place.rename(place.with_name("moved"))
        place.symlink_to(outside)
        folder.write("file", NEW)
        folder.touch("touched")
        with folder.open("file") as file:
            assert file.read() == NEW
        folder.sweep("tou")
    assert content(moved) == {"file": NEW}


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../file", "/etc/passwd"])
def test_a_path_is_no_name(place: Path, name: str) -> None:
    with Folder.at(place) as folder:
        calls: list[Callable[[str], object]] = [
            folder.open, folder.append, folder.create, folder.touch, folder.remove, folder.remove_folder, folder.status,
            folder.folder, lambda name: folder.folder(name, make=0o777), lambda name: folder.write(name, NEW),
            lambda name: folder.place("file", name), lambda name: folder.place(name, "file"),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(LeadsElsewhere):
                call(name)
    assert content(place) == {"file": OLD}


# --- what else callers rely on ---


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_modes_are_as_stated_whatever_the_umask(place: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(place / "readable", NEW)
        write_new(place / "new", NEW)
        write_folder(place / "made" / "folder", {"inner": NEW})
        with Folder.at(place / "private", make=0o700) as folder:
            folder.write("secret", NEW, mode=0o600)
            folder.write("shared", NEW)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(place)): stat.S_IMODE(path.stat().st_mode) for path in place.rglob("*")}
    del modes["file"]
    assert modes == {
        "readable": 0o644, "new": 0o666 & ~umask,
        "made": 0o777 & ~umask, "made/folder": 0o755, "made/folder/inner": 0o666 & ~umask,
        "private": 0o700, "private/secret": 0o600, "private/shared": 0o666 & ~umask,
    }  # fmt: skip


def test_a_folder_that_lets_others_in_is_narrowed(place: Path) -> None:
    place.chmod(0o755)
    with Folder.at(place) as folder:
        folder.narrow(0o700)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_missing_folders_are_made_where_the_caller_says_so_alone(place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Folder.at(place / "a" / "b")
    with pytest.raises(FileNotFoundError, match="a/b/file"):
        write_bytes(place / "a" / "b" / "file", NEW)
    assert list(content(place)) == ["file"] and not (place / "a").exists()
    with Folder.at(place / "a" / "b", make=0o700) as folder, folder.folder("c", make=0o777) as inner:
        inner.touch("d")
    assert (place / "a/b/c/d").is_file()


def test_a_folder_takes_the_place_of_an_empty_one_and_of_nothing_else(place: Path) -> None:
    (place / "empty").mkdir()
    write_folder(place / "empty", {"a": NEW})
    for taken in ("empty", "file"):
        with pytest.raises(FileExistsError, match=f"{taken}: expected a new or empty folder"):
            write_folder(place / taken, {"b": NEW})
    assert content(place) == {"file": OLD, "empty/a": NEW}


def test_a_sweep_takes_what_begins_so_and_is_old_enough(place: Path) -> None:
    for name in (f"{TEMPORARY}old", f"{TEMPORARY}young", ".upload-old", "kept"):
        (place / name).write_bytes(b"half")
    (place / f"{TEMPORARY}link").symlink_to(place / "file")
    (place / f"{TEMPORARY}folder").mkdir()
    for name in (f"{TEMPORARY}old", ".upload-old", "kept"):
        os.utime(place / name, (time.time() - 100, time.time() - 100))
    with Folder.at(place) as folder:
        folder.sweep(older_s=50)
        assert sorted(content(place)) == [f"{TEMPORARY}link", f"{TEMPORARY}young", ".upload-old", "file", "kept"]
        folder.sweep((TEMPORARY, ".upload-"))
    assert content(place) == {"file": OLD, "kept": b"half"}


def test_a_pipe_in_a_files_place_is_not_waited_for(place: Path) -> None:
    os.mkfifo(place / "pipe")
    with Folder.at(place) as folder, folder.open("pipe") as file:
        assert file.read() == b""
    write_bytes(place / "pipe", NEW)
    assert (place / "pipe").read_bytes() == NEW


def test_no_descriptor_stays_open_whatever_fails(place: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    (place / "folder").mkdir()
    for _ in range(3):
        with Folder.at(place) as folder:
            with pytest.raises(IsADirectoryError):
                folder.open("folder")
            with pytest.raises(IsADirectoryError):
                folder.write("folder", NEW)
        with pytest.raises(OSError, match="directory"):
            write_bytes(place / "folder", NEW)
        write_json(place / "file", {})
    assert len(list(Path("/proc/self/fd").iterdir())) == before
