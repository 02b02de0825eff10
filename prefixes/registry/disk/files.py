"""The files below one root: written whole or not at all, removed for good, never outside the root.

Owns the errors and the writers' lock; ``prefixes.files.folder`` owns how a file is written. Does not know what the
files mean. Every call walks from the root, one open folder after the other, and follows no symbolic link. Every failure
of the operating system becomes a named error, which names the path below the root and nothing above it. Only
FileNotFoundError passes, where a method says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from filelock import lock_descriptor, unlock_descriptor

from prefixes.errors import NO_ROOM, InvalidName, PrefixdError, RegistryFull, RegistryUnavailable
from prefixes.files.folder import TEMPORARY, Folder, LeadsElsewhere, write_all
from prefixes.spec import check_name

_LOOK_S: Final = 0.05  # how often a waiting writer looks whether the lock is free


class Files:
    """Reads and writes files below ``root``, addressed by parts that are known to be safe names.

    Failures are RegistryUnavailable, RegistryFull where there is no room; a subclass for other files overrides
    ``failed``.
    """

    def __init__(self, root: Path, lock_timeout_s: float = 30.0) -> None:
        self.root = root.resolve()
        self._lock_timeout_s = lock_timeout_s

    def failed(self, message: str, error: OSError | None = None) -> PrefixdError:
        """The error to raise. ``error`` is the system's, if it was the system that refused."""
        full = error is not None and error.errno in NO_ROOM
        return (RegistryFull if full else RegistryUnavailable)(f"registry: {message}")

    def read(self, *parts: str) -> bytes:
        """The whole file. Raises FileNotFoundError if there is none."""
        with self.opened(*parts) as file:
            return file.read()

    @contextmanager
    def opened(self, *parts: str) -> Iterator[BinaryIO]:
        """The file, for reading. Raises FileNotFoundError if there is none."""
        with self._folder("read", parts) as folder, folder.open(parts[-1]) as file:
            yield file

    def size(self, *parts: str) -> int:
        """Bytes of a file, 0 where there is none."""
        try:
            with self._folder("read", parts) as folder:
                return folder.status(parts[-1]).st_size
        except FileNotFoundError:
            return 0

    def names(self, *parts: str) -> list[str]:
        """Names in a folder, sorted, hidden ones left out; none where there is no folder."""
        try:
            with self._named("list", parts), self._open(parts) as folder:
                return sorted(entry.name for entry in folder.entries() if not entry.name.startswith("."))
        except FileNotFoundError:
            return []

    def write(self, data: bytes, *parts: str) -> None:
        """Write a whole file, or leave the old one. On return it survives a power cut."""
        with self._folder("write", parts, make=True) as folder:
            _refuse_link(folder, parts[-1])
            folder.write(parts[-1], data)

    def create(self, *parts: str) -> int:
        """The descriptor of a new file, for data that comes in pieces. Write and sync it, then ``place`` it."""
        with self._folder("write", parts, make=True) as folder:
            return folder.create(parts[-1])

    def place(self, source: str, *parts: str) -> None:
        """Move the file ``source`` to its place in the same folder. On return it survives a power cut."""
        with self._folder("write", parts, make=True) as folder:
            _refuse_link(folder, parts[-1])
            folder.place(source, parts[-1])

    def touch(self, *parts: str) -> None:
        """Make an empty file if there is none. On return it survives a power cut."""
        with self._folder("write", parts, make=True) as folder:
            folder.touch(parts[-1])

    def append_line(self, data: bytes, *parts: str) -> None:
        """Add a line to a file. On return it survives a power cut. A torn last line stays a line of its own."""
        with self._folder("write", parts, make=True) as folder:
            descriptor = folder.append(parts[-1])
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    data = b"\n" + data
                write_all(descriptor, data + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if not size:
                folder.sync()

    def lines_reversed(self, chunk: int, *parts: str) -> Iterator[bytes]:
        """Lines of a file from the last to the first, read ``chunk`` bytes at a time; none where there is no file."""
        try:
            with self.opened(*parts) as file:
                end, rest = file.seek(0, os.SEEK_END), b""
                while end:
                    begin = max(0, end - chunk)
                    file.seek(begin)
                    rest, *lines = (file.read(end - begin) + rest).split(b"\n")
                    yield from (line for line in reversed(lines) if line)
                    end = begin
                if rest:
                    yield rest
        except FileNotFoundError:
            return

    def remove(self, *parts: str) -> None:
        """Remove a file if it is there. On return the removal survives a power cut."""
        with suppress(FileNotFoundError), self._folder("remove", parts) as folder:
            _refuse_link(folder, parts[-1])
            folder.remove(parts[-1])

    def remove_folder(self, *parts: str) -> None:
        """Remove a folder with the files in it, if it is there. Call it under the lock of that folder."""
        self.sweep(*parts)
        for name in self.names(*parts):
            self.remove(*parts, name)
        with suppress(FileNotFoundError), self._folder("remove", parts) as folder:
            folder.remove_folder(parts[-1])

    def sweep(self, *parts: str, prefix: str = TEMPORARY, older_s: float = 0.0) -> None:
        """Remove temporary files that killed writers left in a folder, last written ``older_s`` seconds ago or more.

        Call it under the lock of that folder, or with an age that no writer at work reaches.
        """
        with suppress(FileNotFoundError), self._named("clean", parts), self._open(parts) as folder:
            folder.sweep(prefix, older_s=older_s)

    @contextmanager
    def lock(self, *parts: str) -> Iterator[None]:
        """Hold the folder's writers' lock, across threads and processes; the system frees it when a holder dies."""
        with self._named("lock", parts, absent_fails=True), self._open(parts, make=True) as folder:
            descriptor = folder.append(".lock")
        try:
            self._acquire(descriptor, parts)
            try:
                yield
            finally:
                unlock_descriptor(descriptor)
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int, parts: tuple[str, ...]) -> None:
        deadline = time.monotonic() + self._lock_timeout_s
        with self._named("lock", parts):
            while not lock_descriptor(descriptor, blocking=False):
                if time.monotonic() >= deadline:
                    raise self.failed(
                        f"cannot lock {_where(parts)} within {self._lock_timeout_s:g} s; another writer holds it"
                    )
                time.sleep(_LOOK_S)

    @contextmanager
    def _folder(self, action: str, parts: tuple[str, ...], *, make: bool = False) -> Iterator[Folder]:
        """The open folder that the file of ``parts`` is in, with errors as in ``_named``.

        ``make`` makes a missing folder; a missing file is then a failure like any other.
        """
        with self._named(action, parts, absent_fails=make), self._open(parts[:-1], make=make) as folder:
            yield folder

    @contextmanager
    def _named(self, action: str, parts: tuple[str, ...], *, absent_fails: bool = False) -> Iterator[None]:
        """Turn an OSError inside into the error of ``failed``; FileNotFoundError only if ``absent_fails``."""
        try:
            yield
        except LeadsElsewhere as error:
            reason = "is or lies behind a symbolic link, or is outside; refused"
            raise self.failed(f"{_where(parts)} {reason}") from error
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not absent_fails:
                raise
            reason = error.strerror or type(error).__name__
            raise self.failed(f"cannot {action} {_where(parts)}: {reason}", error) from error

    def _open(self, parts: tuple[str, ...], *, make: bool = False) -> Folder:
        mode = 0o777 if make else None
        folder = Folder.at(self.root, make=mode, follow=False)
        for name in parts:
            with folder as outer:
                folder = outer.folder(name, make=mode)
        return folder


def is_name(text: str) -> bool:
    """Whether ``text`` is a valid name: a store ignores files of other names."""
    try:
        return bool(check_name("file", text))
    except InvalidName:
        return False


def _where(parts: tuple[str, ...]) -> str:
    return "/".join(parts) or "its root"


def _refuse_link(folder: Folder, name: str) -> None:
    """Raise LeadsElsewhere for a symbolic link in the file's place: we never put one there."""
    with suppress(FileNotFoundError):
        folder.status(name)
