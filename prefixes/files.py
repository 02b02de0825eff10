"""Files that appear whole or not at all: a temporary neighbour, flushed to disk, moved into place.

Owns that order and nothing else.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary neighbour of ``path``, flush it to disk, and move it into place.

    FileNotFoundError where the folder is not there: a run whose folder was taken away must not make it anew.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".part{path.suffix}")
    temporary = Path(name)
    try:
        os.close(descriptor)
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_bytes(path: Path, content: bytes) -> None:
    """``content`` to ``path``, atomically."""
    write_atomic(path, lambda part: part.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """``text`` as UTF-8 to ``path``, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """``document`` as indented JSON, atomically."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
