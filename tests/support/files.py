"""A folder with an old file for tests of writers, and what is in it afterwards."""

from __future__ import annotations

from pathlib import Path

OLD, NEW = b"old" * 1000, b"new!" * 5000


def old_file(place: Path) -> Path:
    """Make the folder ``place``, with an old file."""
    place.mkdir()
    (place / "file").write_bytes(OLD)
    return place


def content(place: Path) -> dict[str, bytes]:
    """Every file below ``place``."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
