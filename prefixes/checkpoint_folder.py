"""Where a backbone's checkpoint lies: in this package, in the cache, in a folder or GGUF file, or on the model hub.

Owns what a backbone's name means; opens no file of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from prefixes.errors import BackboneError
from prefixes.fetchable import FETCHABLE, fetched_file

DEMOS: Final[Mapping[str, str]] = {"demo": "gpt2", "demo-bart": "bart"}
"""Bundled backbones: name -> folder under ``prefixes/demo``."""


class Place(NamedTuple):
    """A folder or a hub id, and the checkpoint's file in the folder if it is a GGUF file."""

    folder: str
    gguf: Path | None = None


def checkpoint_place(name: str) -> Place:
    """What is loaded for ``name``: what is bundled or fetched under it, a folder, a GGUF file, or it as a hub id."""
    if name in DEMOS:
        folder = Path(__file__).parent / "demo" / DEMOS[name]
        if not folder.is_dir():
            raise BackboneError(
                f"backbone {name!r}: expected the bundled checkpoint in prefixes/demo/{DEMOS[name]}, found none"
            )
        return Place(str(folder))
    if name in FETCHABLE:
        file = fetched_file(name)
        if not file.is_file():
            raise BackboneError(f"backbone {name!r}: expected {file}, found none: prefixd backbones fetch {name}")
        return Place(str(file.parent), file)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return Place(str(path))
    if path.suffix == ".gguf" and path.is_file():
        return Place(str(path.parent), path)
    if not name or name.startswith(("/", ".", "~")) or path.suffix == ".gguf":
        raise BackboneError(f"backbone {name!r}: expected a folder or FOLDER/NAME.gguf, found none", name=name)
    return Place(name)
