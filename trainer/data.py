"""Training data: JSONL of ``{"input", "target"}`` lines.

Owns the file format, its errors and the split by input; knows no tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from prefixes.errors import PrefixdError
from trainer.corpora import held_out


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
    """The examples of a file, and the sha256 of its bytes."""

    examples: tuple[Example, ...]
    digest: str

    def split(self, percent: int) -> tuple[Dataset, Dataset]:
        """Training and validation part; ``percent`` of the inputs, by their hash, are held out with all their lines."""
        kept = tuple(example for example in self.examples if not held_out(example.input, percent))
        apart = tuple(example for example in self.examples if held_out(example.input, percent))
        return Dataset(kept, self.digest), Dataset(apart, self.digest)


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
    return Dataset(examples, f"sha256:{hashlib.sha256(content).hexdigest()}")


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
    return Example(number, record["input"], record["target"])
