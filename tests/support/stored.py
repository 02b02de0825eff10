"""Copies what an earlier commit stored to a place of a test's own: see ``tests/stored/README.md``.

Owns how a folder is copied and how recorded commands go into a Redis. Does not know what they mean.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any, Final

from tests.support.paths import ROOT
from tests.support.redis_server import RedisServer

STORED: Final = ROOT / "tests" / "stored" / "3b858cc"


class Stored:
    """Copies below ``folder``, and in databases of ``server`` where there is one, each call's its own."""

    def __init__(self, folder: Path, server: RedisServer | None) -> None:
        self.kind = "redis" if server else "disk"
        self._folder, self._server, self._databases = folder, server, 0
        if server:
            server.flush()

    def read(self, name: str) -> Any:
        """What the commit that wrote it reads of it."""
        return json.loads((STORED / f"{name}-{self.kind}.json").read_text())

    def folder(self, name: str) -> Path:
        """The files of it."""
        return Path(shutil.copytree(STORED / f"{name}-{self.kind}", self._folder / name))

    def url(self, name: str) -> str:
        """Where it is now: a folder, or a database into which its commands went."""
        if self._server is None:
            return f"disk://{self.folder(name)}"
        number, self._databases = self._databases, self._databases + 1
        with self.client(number) as client, (STORED / f"{name}-redis.jsonl").open() as lines:
            for line in lines:
                client.execute_command(*map(_part, json.loads(line)))
        return f"redis://{self._server.address}/{number}?timeout_s=20"  # a busy machine's slowness is not tested

    def client(self, number: int = 0) -> Any:
        """For a look into a database, numbered in the order of the calls of ``url``."""
        assert self._server is not None
        return self._server.client(db=number)


def _part(written: str | dict[str, str]) -> str | bytes:
    return written if isinstance(written, str) else base64.b64decode(written["base64"])
