"""Training data: JSONL of ``{"input", "target"}`` lines, tokenised and cut into batches.

Owns the file format, its errors and the order of batches; knows no model. The order of an epoch is a pure function of
seed and epoch, so that a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefixes.errors import PrefixdError
from prefixes.prompt import PromptEncoder
from trainer.corpora import held_out

BUCKET_BATCHES = 50  # so many batches' worth of shuffled examples are sorted by length together


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


@dataclass(frozen=True)
class TokenExample:
    """Prompt, target and end token in one list; ``start`` is the index of the first token to learn."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Batch:
    """A right-padded batch. ``predict`` are flat indices into ``ids`` whose next token, ``targets``, is learnt."""

    ids: Tensor  # (sequences, length) int64
    predict: Tensor  # (learnt,) int64, into ids.flatten()
    targets: Tensor  # (learnt,) int64
    sequence: Tensor  # (learnt,) int64: which sequence each learnt token belongs to


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


def tokenize(
    encoder: PromptEncoder, template: str, end: int, dataset: Dataset, window: int, *, drop_long: bool = False
) -> tuple[list[TokenExample], int]:
    """Tokenise every example as the server does its prompts; the target and the token ``end`` follow.

    ``window`` is the number of tokens a sequence may have (the prefix already taken off). A longer example raises
    InvalidData with its line, or with ``drop_long`` is left out; the second value counts those.
    """
    made: list[TokenExample] = []
    for example in dataset.examples:
        prompt = encoder.encode(template, example.input)
        ids = (*prompt, *encoder.encode_text(example.target), end)
        if len(ids) <= window:
            made.append(TokenExample(ids, len(prompt)))
        elif not drop_long:
            raise InvalidData(
                f"line {example.line}: expected at most {window} tokens of prompt and target, got {len(ids)} "
                "(--drop-long leaves such lines out)",
                line=example.line,
                expected=window,
                got=len(ids),
            )
    if not made:
        raise InvalidData(f"no example fits the window of {window} tokens", expected=window)
    return made, len(dataset.examples) - len(made)


def epoch_batches(examples: Sequence[TokenExample], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as indices: shuffled, like lengths together within a window, shuffled again."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    rng.shuffle(order)
    made: list[list[int]] = []
    for begin in range(0, len(order), BUCKET_BATCHES * size):
        bucket = sorted(order[begin : begin + BUCKET_BATCHES * size], key=lambda index: len(examples[index].ids))
        made += [bucket[index : index + size] for index in range(0, len(bucket), size)]
    rng.shuffle(made)
    return made


def collate(examples: Sequence[TokenExample], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Pad on the right; only target and end tokens are learnt."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad, dtype=torch.long)
    predict, targets, sequence = [], [], []
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        for index in range(example.start, len(example.ids)):
            predict.append(row * longest + index - 1)
            targets.append(example.ids[index])
            sequence.append(row)
    return Batch(ids.to(device), *(torch.tensor(values, device=device) for values in (predict, targets, sequence)))
