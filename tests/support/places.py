"""Places for registries, of either store. A test can empty a place and look into it without the registry.

Owns their URLs and contents. Starts a Redis when a test first asks for one. Knows no test.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tests.support.redis_server import RedisServer


class Place(Protocol):
    """Where one registry is, or is not."""

    url: str

    def wipe(self) -> None:
        """Lose everything."""

    def contents(self) -> Any:
        """All that is stored, to be compared with what is stored later."""


class Folder:
    """A place on disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, f"disk://{path}"

    def wipe(self) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def contents(self) -> Any:
        """Every path with its bytes and time of change: also what was written as it was before."""
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in [self.path, *self.path.rglob("*")]
            if path.exists()
        }


class Database:
    """A numbered database of a Redis server."""

    def __init__(self, server: RedisServer, number: int) -> None:
        self._server, self._number = server, number
        self.url = f"redis://{server.address}/{number}"

    def wipe(self) -> None:
        with self._server.client(db=self._number) as client:
            client.flushdb()

    def contents(self) -> Any:
        with self._server.client(db=self._number) as client:
            return {key: client.dump(key) for key in client.scan_iter(count=1000)}


class Places:
    """Gives out places of a kind, ``"disk"`` or ``"redis"``, empty ones."""

    def __init__(self, folder: Path, server: RedisServer | None) -> None:
        self._folder, self._server, self._number = folder, server, 0

    def new(self, name: str) -> Place:
        """An empty place; ``name`` is what a folder is called."""
        if self._server is None:
            return Folder(self._folder / name)
        place = Database(self._server, self._number)
        place.wipe()
        self._number += 1
        return place


@contextmanager
def redis_server(kind: str) -> Iterator[RedisServer | None]:
    """A server for the places of that kind."""
    if kind == "disk":
        yield None
    else:
        with RedisServer() as server:
            yield server
