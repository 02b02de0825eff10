"""Training data: a JSONL file of ``{"input", "target"}`` lines.

Owns the reading of a file, the split by input and what two sides share; ``lines`` owns the format of a line. Knows no
tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from trainer.data.corpora import held_out
from trainer.data.lines import Example, InvalidData, LineReader
from trainer.data.seen import in_gate

__all__ = ["Dataset", "Example", "InvalidData", "read_dataset", "shared_inputs"]

HOLD_OUT_SALT: Final = "validation:"
"""Makes this split independent of ``prefixd convert --split``: with its hash, none of its training side is held out."""
_CHUNK: Final = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Dataset:
    """The examples of a file, the sha256 of its bytes, and its name in errors."""

    examples: tuple[Example, ...]
    digest: str
    name: str = "data"

    def split(self, percent: int) -> tuple[Dataset, Dataset]:
        """Return training and validation part. Inputs are held out by hash, about ``percent``, with all their lines."""
        return self._split(lambda text: held_out(text, percent, salt=HOLD_OUT_SALT))

    def split_gate(self, percent: int) -> tuple[Dataset, Dataset]:
        """Return what may be trained on, and the gate's share: the same inputs of every file that has them."""
        return self._split(lambda text: in_gate(text, percent))

    def _split(self, is_held_out: Callable[[str], bool]) -> tuple[Dataset, Dataset]:
        sides: dict[bool, list[Example]] = {False: [], True: []}
        for example in self.examples:
            sides[is_held_out(example.input)].append(example)
        return replace(self, examples=tuple(sides[False])), replace(self, examples=tuple(sides[True]))


def shared_inputs(train: Dataset, held_out: Dataset) -> tuple[int, int]:
    """How many different inputs of ``held_out`` are, to the character, inputs of ``train`` too, and how many it has."""
    known, asked = ({example.input for example in side.examples} for side in (train, held_out))
    return len(known & asked), len(asked)


def read_dataset(path: Path) -> Dataset:
    """Read a JSONL file. InvalidData names the line, the field, and what was expected and found.

    Only the examples and one chunk of the file are in memory.
    """
    reader, digest = LineReader(path.name), hashlib.sha256()
    examples: list[Example] = []
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                examples.extend(reader.feed(chunk))
    except OSError as error:
        raise InvalidData(f"{path}: expected a UTF-8 JSONL file, got {error}", path=str(path)) from error
    examples.extend(reader.finish())
    return Dataset(tuple(examples), f"sha256:{digest.hexdigest()}", path.name)
