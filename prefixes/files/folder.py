"""A folder that is open: what is in it is reached through its descriptor, and written whole or not at all.

Owns how a file gets to its place (a temporary neighbour, fsync, rename, fsync of the folder) and the names of those
neighbours. A name is looked up in the open folder, once, and a symbolic link is never followed: whoever exchanges a
folder for a link meanwhile gains nothing. Knows not what the files mean; failures are the system's own OSErrors.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

TEMPORARY: Final = ".tmp-"
"""How the name of a file begins that is not yet in its place."""

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY
_UNFOLLOWED: Final = os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe in a file's place would be waited for


class LeadsElsewhere(OSError):
    """The name is a symbolic link, or a path and no name: what it stands for is not in the folder."""


class Folder:
    """An open folder; a context manager that closes it. Several may be open on one folder, in any process.

    What is written to a ``durable`` one, and to the folders opened from it, survives a power cut once a call is back.
    Modes are exact; None is what the process's umask leaves of reading and writing for all.
    """

    def __init__(self, descriptor: int, *, durable: bool = True) -> None:
        """Take over ``descriptor``."""
        self.descriptor: Final = descriptor
        self._durable = durable

    @classmethod
    def at(cls, path: Path, *, make: int | None = None, follow: bool = True, durable: bool = True) -> Folder:
        """Open the folder at ``path``; with ``make`` a missing one is made, with this mode less the umask.

        Links in the path are followed: it is the caller's. Without ``follow`` its last part may not be one.
        """
        try:
            return cls(_open(str(path), _FOLDER | (0 if follow else os.O_NOFOLLOW)), durable=durable)
        except FileNotFoundError:
            if make is None:
                raise
        with cls.at(path.parent, make=0o777, durable=durable) as parent:
            return parent.folder(path.name, make=make)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def folder(self, name: str, *, make: int | None = None) -> Folder:
        """Open a folder in this one; ``make`` as in ``at``."""
        try:
            return self._folder(name)
        except FileNotFoundError:
            if make is None:
                raise
        with suppress(FileExistsError):
            os.mkdir(_checked(name), make, dir_fd=self.descriptor)
        self.sync()
        return self._folder(name)

    def entries(self) -> list[os.DirEntry[str]]:
        """What is in the folder, in no order. Ask an entry nothing about where a link leads."""
        with os.scandir(self.descriptor) as entries:
            return list(entries)

    def status(self, name: str) -> os.stat_result:
        """Size, kind and times of a file. Raises LeadsElsewhere for a link."""
        found = os.stat(_checked(name), dir_fd=self.descriptor, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            raise _elsewhere(name)
        return found

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. What is no regular file is not waited for."""
        descriptor = _open(_checked(name), os.O_RDONLY | _UNFOLLOWED, folder=self.descriptor)
        try:
            return os.fdopen(descriptor, "rb")
        except BaseException:  # a folder
            os.close(descriptor)
            raise

    def append(self, name: str, *, mode: int = 0o666) -> int:
        """The descriptor of a file for reading and for additions; a missing one is made, with ``mode`` less the umask.

        What is added is neither whole nor synced by itself.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _UNFOLLOWED
        return _open(_checked(name), flags, mode, folder=self.descriptor)

    def create(self, name: str, *, mode: int | None = None) -> int:
        """The descriptor of a new file, for what comes in pieces; once written and synced, ``place`` it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = _open(_checked(name), flags, 0o666 if mode is None else mode, folder=self.descriptor)
        try:
            if mode is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
                os.fchmod(descriptor, mode)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def write(self, name: str, data: bytes, *, mode: int | None = None) -> None:
        """Put a file with ``data`` into its place, whatever is there, or leave what was there."""
        with self.temporary(data, mode=mode) as temporary:
            self.place(temporary, name)

    def place(self, source: str, name: str) -> None:
        """Move a file that is written and synced to its place, whatever is there."""
        os.replace(_checked(source), _checked(name), src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        self.sync()

    @contextmanager
    def temporary(self, data: bytes, *, mode: int | None = None) -> Iterator[str]:
        """The name of a new file with ``data``, synced; in the end it is gone unless it was moved to its place."""
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            self._fill(name, data, mode)
            yield name
        finally:
            with suppress(OSError):
                os.unlink(name, dir_fd=self.descriptor)

    @contextmanager
    def temporary_folder(self, files: Mapping[str, bytes], *, mode: int) -> Iterator[str]:
        """As ``temporary``, for a folder with ``files``."""
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            with self.folder(name, make=0o700) as folder:
                for file, data in files.items():
                    folder._fill(file, data, None)
                os.fchmod(folder.descriptor, mode)
                folder.sync()
            yield name
        finally:
            shutil.rmtree(name, ignore_errors=True, dir_fd=self.descriptor)

    def touch(self, name: str, *, mode: int = 0o666) -> None:
        """Make an empty file where there is none, with ``mode`` less the umask."""
        os.close(_open(_checked(name), os.O_WRONLY | os.O_CREAT | _UNFOLLOWED, mode, folder=self.descriptor))
        self.sync()

    def remove(self, name: str) -> None:
        """Remove a file, or a link itself, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(_checked(name), dir_fd=self.descriptor)
        self.sync()

    def remove_folder(self, name: str) -> None:
        """Remove an empty folder."""
        os.rmdir(_checked(name), dir_fd=self.descriptor)
        self.sync()

    def sweep(self, beginning: str | tuple[str, ...] = TEMPORARY, *, older_s: float = 0.0) -> None:
        """Remove the files that killed writers left: their names begin so, and they are ``older_s`` seconds old.

        Call it as the folder's only writer, or with an age that no writer at work reaches.
        """
        for entry in self.entries():
            if entry.name.startswith(beginning) and not entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    if not older_s or time.time() - entry.stat(follow_symlinks=False).st_mtime >= older_s:
                        os.unlink(entry.name, dir_fd=self.descriptor)

    def narrow(self, mode: int) -> None:
        """Give the folder ``mode`` where it lets in more than that. Raises PermissionError for somebody else's."""
        if os.fstat(self.descriptor).st_mode & 0o777 & ~mode:
            os.fchmod(self.descriptor, mode)

    def sync(self) -> None:
        """Make the names in a durable folder survive a power cut."""
        if self._durable:
            os.fsync(self.descriptor)

    def _folder(self, name: str) -> Folder:
        flags = _FOLDER | os.O_NOFOLLOW
        return Folder(_open(_checked(name), flags, folder=self.descriptor), durable=self._durable)

    def _fill(self, name: str, data: bytes, mode: int | None) -> None:
        descriptor = self.create(name, mode=mode)
        try:
            write_all(descriptor, data)
            if self._durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write it all: the system may take a part only, as where a disk becomes full."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _open(name: str, flags: int, mode: int = 0o777, *, folder: int | None = None) -> int:
    try:
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=folder)
    except OSError as error:
        if flags & os.O_NOFOLLOW and error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, folder):
            raise _elsewhere(name) from None
        raise


def _is_link(name: str, folder: int | None) -> bool:
    with suppress(OSError):
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    return False


def _checked(name: str) -> str:
    if "/" in name or name in ("", ".", ".."):
        raise _elsewhere(name)
    return name


def _elsewhere(name: str) -> LeadsElsewhere:
    return LeadsElsewhere(errno.ELOOP, "expected a file or folder of this name, got a symbolic link or a path", name)
