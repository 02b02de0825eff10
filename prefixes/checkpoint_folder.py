"""Where a backbone's checkpoint lies: in this package, in a folder, or on the model hub.

Owns what a backbone's name means; opens no file of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from prefixes.errors import BackboneError

DEMOS: Final[Mapping[str, str]] = {"demo": "gpt2", "demo-bart": "bart"}
"""Bundled backbones: name -> folder under ``prefixes/demo``."""


def checkpoint_folder(name: str) -> str:
    """What transformers loads for ``name``: a bundled demo's folder, a folder, or ``name`` itself as a hub id."""
    if name in DEMOS:
        folder = Path(__file__).parent / "demo" / DEMOS[name]
        if not folder.is_dir():
            raise BackboneError(
                f"backbone {name!r}: expected the bundled checkpoint in prefixes/demo/{DEMOS[name]}, found none"
            )
        return str(folder)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if not name or name.startswith(("/", ".", "~")):
        raise BackboneError(f"backbone {name!r}: expected a folder, found none", name=name)
    return name
