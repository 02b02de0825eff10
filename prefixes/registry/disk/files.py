"""Files under one root that are whole or absent: atomic writes, removals that last, and no way out of the root.

Owns the discipline (temporary file, fsync, rename, fsync of the folder); knows not what the files mean. Every failure
of the operating system becomes a named error, which names the path below the root and nothing above it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from prefixes.errors import PrefixdError, RegistryUnavailable

TEMPORARY: Final = ".tmp-"


class Files:
    """Reads and writes of files below ``root``, addressed by parts that are known to be safe names.

    Failures are RegistryUnavailable; who keeps something else overrides ``failed``.
    """

    def __init__(self, root: Path, lock_timeout_s: float = 30.0) -> None:
        self.root = root.resolve()
        self._lock_timeout_s = lock_timeout_s

    def failed(self, message: str, error: OSError | None = None) -> PrefixdError:
        """The error to raise, ``error`` being the system's where it was the one to refuse."""
        return RegistryUnavailable(f"registry: {message}")

    def path(self, *parts: str) -> Path:
        """The path below the root. Raises what ``failed`` makes where a symbolic link, or a part, leads elsewhere."""
        path = self.root.joinpath(*parts)
        if path.resolve() != path or not path.is_relative_to(self.root):
            where = "/".join(parts)
            raise self.failed(f"{where} is or lies behind a symbolic link, or is outside; refused")
        return path

    @contextmanager
    def guarded(self, action: str, *parts: str) -> Iterator[Path]:
        """The path of ``parts``; an OSError inside, but for FileNotFoundError, becomes what ``failed`` makes."""
        try:
            yield self.path(*parts)
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise self.failed(f"cannot {action} {'/'.join(parts) or 'its root'}: {reason}", error) from error

    def read(self, *parts: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""
        with self.guarded("read", *parts) as path:
            return path.read_bytes()

    def size(self, *parts: str) -> int:
        """Bytes of a file, 0 where there is none."""
        try:
            with self.guarded("read", *parts) as path:
                return path.stat().st_size
        except FileNotFoundError:
            return 0

    def names(self, *parts: str) -> list[str]:
        """Names in a folder, sorted, hidden ones left out; none where there is no folder."""
        try:
            with self.guarded("list", *parts) as path:
                return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        except FileNotFoundError:
            return []

    def write(self, data: bytes, *parts: str) -> None:
        """Write a whole file, or leave what was there; once back, it survives a power cut."""
        with self._making("write", *parts) as path:
            self._make_folder(path.parent)
            temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)  # noqa: PTH105
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def create(self, *parts: str) -> int:
        """The descriptor of a new file, for what comes in pieces; once written and synced, ``place`` it."""
        with self._making("write", *parts) as path:
            self._make_folder(path.parent)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def place(self, source: tuple[str, ...], *parts: str) -> None:
        """Move a file to its place in the same folder, whatever is there; once back, it survives a power cut."""
        with self._making("write", *parts) as path:
            os.replace(self.path(*source), path)  # noqa: PTH105
            _sync_folder(path.parent)

    def touch(self, *parts: str) -> None:
        """Make an empty file where there is none; once back, it survives a power cut."""
        with self._making("write", *parts) as path:
            self._make_folder(path.parent)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
            _sync_folder(path.parent)

    def append_line(self, data: bytes, *parts: str) -> None:
        """Add a line to a file; once back, it survives a power cut. A torn last line stays torn, and by itself."""
        with self._making("write", *parts) as path:
            new = not path.exists()
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    data = data if file.read(1) == b"\n" else b"\n" + data
                file.write(data + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                _sync_folder(path.parent)

    def lines_reversed(self, chunk: int, *parts: str) -> Iterator[bytes]:
        """Lines of a file from the last to the first, read ``chunk`` bytes at a time; none where there is no file."""
        try:
            with self.guarded("read", *parts) as path, path.open("rb") as file:
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
        """Remove a file if it is there; once back, it stays removed."""
        with suppress(FileNotFoundError), self.guarded("remove", *parts) as path:
            path.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def remove_folder(self, *parts: str) -> None:
        """Remove a folder with the files in it, if it is there. Call it under the lock of that folder."""
        self.sweep(*parts)
        for name in self.names(*parts):
            self.remove(*parts, name)
        with suppress(FileNotFoundError), self.guarded("remove", *parts) as path:
            path.rmdir()
            _sync_folder(path.parent)

    def sweep(self, *parts: str, prefix: str = TEMPORARY, older_s: float = 0.0) -> None:
        """Remove temporary files that killed writers left in a folder, last written ``older_s`` seconds ago or more.

        Call it under the lock of that folder, or with an age that no writer at work reaches.
        """
        with suppress(FileNotFoundError), self.guarded("clean", *parts) as path:
            for entry in list(path.iterdir()):
                if entry.name.startswith(prefix) and (not older_s or time.time() - entry.lstat().st_mtime >= older_s):
                    entry.unlink(missing_ok=True)

    @contextmanager
    def lock(self, *parts: str) -> Iterator[None]:
        """Hold the folder's writers' lock, across threads and processes; the system frees it when a holder dies."""
        with self._making("lock", *parts) as path:
            self._make_folder(path)
            lock = FileLock(self.path(*parts, ".lock"), timeout=self._lock_timeout_s)
            try:
                lock.acquire()
            except Timeout:
                where = "/".join(parts) or "its root"
                raise self.failed(
                    f"cannot lock {where} within {self._lock_timeout_s:g} s; another writer holds it"
                ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _making(self, action: str, *parts: str) -> Iterator[Path]:
        """As ``guarded``, for what creates its folders: a missing one is a failure like any other."""
        try:
            with self.guarded(action, *parts) as path:
                yield path
        except FileNotFoundError as error:
            where = "/".join(parts) or "its root"
            raise self.failed(f"cannot {action} {where}: {error.strerror}", error) from error

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for made in reversed(missing):
            made.mkdir(exist_ok=True)
            _sync_folder(made.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
