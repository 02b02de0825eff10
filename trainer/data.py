"""Training data: JSONL of ``{"input", "target"}`` lines.

Owns the file format, its errors and the split by input; knows no tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from prefixes.errors import PrefixdError
from trainer.corpora import encodable, held_out

HOLD_OUT_SALT: Final = "validation:"
"""Another split than ``prefixd convert --split``: by the same hash, nothing of its training side would be held out."""


class InvalidData(PrefixdError):
    """A training file is missing, or one of its lines is not what the format asks for."""

    code = "invalid_data"


@dataclass(frozen=True)
class Example:
    """One line: the input as the server will get it, and the output to learn."""

    line: int
    input: str
    target: str


@dataclass(frozen=True)
class Dataset:
    """The examples of a file, the sha256 of its bytes, and what errors call it."""

    examples: tuple[Example, ...]
    digest: str
    name: str = "data"

    def split(self, percent: int) -> tuple[Dataset, Dataset]:
        """Training and validation part; ``percent`` of the inputs, by their hash, are held out with all their lines."""
        sides: dict[bool, list[Example]] = {False: [], True: []}
        for example in self.examples:
            sides[held_out(example.input, percent, salt=HOLD_OUT_SALT)].append(example)
        return replace(self, examples=tuple(sides[False])), replace(self, examples=tuple(sides[True]))


def read_dataset(path: Path) -> Dataset:
    """Read a JSONL file. InvalidData names the line, the field, what was expected and what was there."""
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"{path}: expected a UTF-8 JSONL file, got {error}", path=str(path)) from error
    examples = tuple(_example(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not examples:
        raise InvalidData(f"{path}: expected at least one line, got none", path=str(path))
    return Dataset(examples, f"sha256:{hashlib.sha256(content).hexdigest()}", path.name)


def _example(path: Path, number: int, line: str) -> Example:
    where = f"{path.name} line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidData(f"{where}: expected JSON, got {error}", line=number) from error
    if not isinstance(record, dict) or set(record) != {"input", "target"}:
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise InvalidData(f"{where}: expected an object with 'input' and 'target', got {got}", line=number)
    for field in ("input", "target"):
        if not isinstance(record[field], str) or not record[field].strip():
            kind = "an empty one" if isinstance(record[field], str) else type(record[field]).__name__
            raise InvalidData(f"{where}, field {field!r}: expected a text, got {kind}", line=number, field=field)
        try:
            encodable(record[field])
        except ValueError as error:
            raise InvalidData(
                f"{where}, field {field!r}: expected a text, got {error}", line=number, field=field
            ) from None
    return Example(number, record["input"], record["target"])
