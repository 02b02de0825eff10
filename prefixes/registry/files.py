"""Files under one root that are whole or absent: atomic writes, removals that last, and no way out of the root.

Owns the discipline (temporary file, fsync, rename, fsync of the folder); knows not what the files mean. Every failure
of the operating system becomes RegistryUnavailable, which names the path below the root and nothing above it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from prefixes.errors import RegistryUnavailable

TEMPORARY: Final = ".tmp-"


class Files:
    """Reads and writes of files below ``root``, addressed by parts that are known to be safe names."""

    def __init__(self, root: Path, lock_timeout_s: float = 30.0) -> None:
        self.root = root.resolve()
        self._lock_timeout_s = lock_timeout_s

    def path(self, *parts: str) -> Path:
        """The path below the root. Raises RegistryUnavailable where a symbolic link leads elsewhere."""
        path = self.root.joinpath(*parts)
        if path.resolve() != path:
            raise RegistryUnavailable(f"registry: {'/'.join(parts)} is or lies behind a symbolic link; refused")
        return path

    @contextmanager
    def guarded(self, action: str, *parts: str) -> Iterator[Path]:
        """The path of ``parts``; an OSError inside, but for FileNotFoundError, becomes RegistryUnavailable."""
        try:
            yield self.path(*parts)
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise RegistryUnavailable(f"registry: cannot {action} {'/'.join(parts) or 'its root'}: {reason}") from error

    def read(self, *parts: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""
        with self.guarded("read", *parts) as path:
            return path.read_bytes()

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

    def remove(self, *parts: str) -> None:
        """Remove a file if it is there; once back, it stays removed."""
        with self._making("remove", *parts) as path:
            path.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def sweep(self, *parts: str) -> None:
        """Remove temporary files that killed writers left in a folder. Call it under the lock of that folder."""
        with suppress(FileNotFoundError), self.guarded("clean", *parts) as path:
            for entry in list(path.iterdir()):
                if entry.name.startswith(TEMPORARY):
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
                raise RegistryUnavailable(
                    f"registry: cannot lock {where} within {self._lock_timeout_s:g} s; another writer holds it"
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
            raise RegistryUnavailable(f"registry: cannot {action} {where}: {error.strerror}") from error

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
