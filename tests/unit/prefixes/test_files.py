"""Files are written whole or not at all: bad disks, killed writers, many at once, a folder that is moved away."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixes.files import write_bytes, write_folder, write_new
from prefixes.files.folder import TEMPORARY, Folder
from tests.support.files import NEW, OLD, content, old_file
from tests.support.processes import FORK

CALLS = ("open", "write", "fsync", "replace", "link", "mkdir", "fchmod")

WRITERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda place: write_bytes(place / "file", NEW),
    "a file, not durable": lambda place: write_bytes(place / "file", NEW, durable=False),
    "a file by descriptor": lambda place: _write(place, mode=0o600),
    "a new file": lambda place: write_new(place / "new", NEW),
    "a folder": lambda place: write_folder(place / "folder", {"a": NEW, "b": NEW}),
}


def _write(place: Path, mode: int | None = None) -> None:
    with Folder.at(place) as folder:
        folder.write("file", NEW, mode=mode)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an old file."""
    return old_file(tmp_path / "place")


def wanted(writer: str) -> dict[str, bytes]:
    """What is there when the writer has come to its end."""
    if writer == "a folder":
        return {"file": OLD, "folder/a": NEW, "folder/b": NEW}
    return {"file": OLD, "new": NEW} if writer == "a new file" else {"file": NEW}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failed_write_leaves_what_was_there_and_nothing_beside_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, writer: str, call: str
) -> None:
    """Each system call of a write fails, one after the other; before a write fails, the disk takes a part."""
    real = getattr(os, call)
    for failing in range(20):
        count = 0

        def fail(*args: Any, nth: int = failing, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth + 1:
                if call == "write":
                    real(args[0], args[1][:100])
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                WRITERS[writer](place)
            except OSError as error:
                assert error.strerror == "No space left on device"
                synced = call == "fsync" and content(place) == wanted(writer)  # in its place; the folder is not synced
                assert synced or content(place) == {"file": OLD}
        if count <= failing:
            assert content(place) == wanted(writer)
            return
        for path in place.iterdir():
            assert not path.name.startswith(TEMPORARY)
        if (place / "folder").exists():
            shutil.rmtree(place / "folder")
        (place / "new").unlink(missing_ok=True)
        (place / "file").write_bytes(OLD)
    pytest.fail("the write never got through")


def _killed(place: Path, writer: str, nth: int) -> None:
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in (*CALLS, "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    WRITERS[writer](place)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_killed_at_any_system_call_leaves_the_old_or_the_new_and_what_can_be_swept(
    tmp_path: Path, writer: str
) -> None:
    seen = []
    for nth in range(30):
        place = old_file(tmp_path / str(nth))
        process = FORK.Process(target=_killed, args=(place, writer, nth))
        process.start()
        process.join(30)
        with Folder.at(place) as folder:
            folder.sweep()
        found = {name: data for name, data in content(place).items() if not name.startswith(TEMPORARY)}
        assert found in ({"file": OLD}, wanted(writer))
        seen.append(found == wanted(writer))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert writer == "a folder" or not list(place.glob(f"{TEMPORARY}*"))
    assert seen == sorted(seen)  # one moment at which it is there
    assert not seen[0] and seen[-1]


@pytest.mark.parametrize("writer", WRITERS)
def test_the_content_is_on_the_disk_before_its_name_and_the_name_before_the_call_is_back(
    place: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    steps: list[str] = []
    unsynced: set[int] = set()

    def note(call: str) -> None:
        real = getattr(os, call)

        def noted(*args: Any, **options: Any) -> Any:
            if call in ("write", "fsync"):
                inode = os.fstat(args[0]).st_ino
                steps.append(f"{call} {'folder' if stat.S_ISDIR(os.fstat(args[0]).st_mode) else 'file'}")
                (unsynced.add if call == "write" else unsynced.discard)(inode)
            else:
                steps.append(call)
                if call in ("replace", "link") and "not durable" not in writer:
                    assert not unsynced
            return real(*args, **options)

        monkeypatch.setattr(os, call, noted)

    for call in ("write", "fsync", "replace", "link"):
        note(call)
    WRITERS[writer](place)
    assert steps == {
        "a file, not durable": ["write file", "replace"],
        "a new file": ["write file", "fsync file", "link", "fsync folder"],
        "a folder": [
            "fsync folder", *["write file", "fsync file"] * 2, "fsync folder", "replace", "fsync folder",
        ],
    }.get(writer, ["write file", "fsync file", "replace", "fsync folder"])  # fmt: skip


def test_what_the_system_takes_in_parts_is_written_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1000]))
        write_bytes(place / "file", NEW)
    assert content(place) == {"file": NEW}


def test_of_many_writers_at_once_one_has_written_all_of_it_whenever_one_looks(place: Path) -> None:
    contents = [bytes([letter]) * 100_000 for letter in b"abcd"]
    (place / "file").write_bytes(contents[0])
    faults: list[BaseException] = []

    def write(data: bytes) -> None:
        try:
            for _ in range(25):
                write_bytes(place / "file", data, durable=False)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    looks = 0
    while any(thread.is_alive() for thread in threads) or not looks:
        assert (place / "file").read_bytes() in contents
        looks += 1
    for thread in threads:
        thread.join()
    assert faults == []
    assert list(content(place)) == ["file"]


def test_of_many_that_make_a_new_file_one_has_made_it(place: Path) -> None:
    made: list[int] = []
    barrier = threading.Barrier(6)

    def make(number: int) -> None:
        barrier.wait()
        try:
            write_new(place / "new", b"%d" % number)
            made.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=make, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(place) == {"file": OLD, "new": b"%d" % made[0]} and len(made) == 1


@pytest.mark.parametrize("moment", ["open", "write", "fsync"])
def test_a_writer_whose_folder_is_moved_away_under_it_changes_nothing_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The fence of a job: a writer that was stopped in the middle wakes up after another one has taken its folder."""
    moved = place.with_name("moved")
    real = getattr(os, moment)

    def move(*args: Any, **options: Any) -> Any:
        done = real(*args, **options)
        if place.exists():
            place.rename(moved)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, move)
        with pytest.raises(FileNotFoundError):
            write_bytes(place / "file", NEW)
    assert content(moved) == {"file": OLD}
    assert not place.exists()
