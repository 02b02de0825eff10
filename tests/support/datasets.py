"""Datasets for tests: lines, uploads in pieces cut anywhere, and what a store's folder holds. Knows no test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.files import DatasetInfo
from trainer.data.store import DatasetStore

LIMIT = 1 << 30


def line(number: int, text: str = "Blue Spice is a coffee shop.") -> bytes:
    """A line of its own."""
    return json.dumps({"input": f"name : Blue Spice {number}", "target": text}).encode() + b"\n"


def lines(count: int) -> bytes:
    """So many lines."""
    return b"".join(line(number) for number in range(count))


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    """``content`` in chunks of ``size`` bytes."""
    return (content[begin : begin + size] for begin in range(0, len(content), size))


def upload(
    store: DatasetStore, content: bytes | Iterable[bytes], tenant: str = "acme", *, name: str | None = None
) -> DatasetInfo:
    """Upload a dataset, whole."""
    with store.begin(tenant, max_bytes=LIMIT, name=name) as begun:
        for chunk in [content] if isinstance(content, bytes) else content:
            begun.write(chunk)
        return begun.finish()


def files(root: Path) -> list[str]:
    """Every file below ``root`` but for the locks."""
    found = (path for path in root.rglob("*") if not path.is_dir() and path.name != ".lock")
    return sorted(str(path.relative_to(root)) for path in found)
