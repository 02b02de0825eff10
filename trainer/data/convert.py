"""Converts a corpus to the trainer's JSONL, one line per input and reference.

Owns the choices (split, direction, case, spaces) and the file it writes; ``corpora`` and ``xsum`` own the corpora's
formats.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from prefixes.errors import InvalidParameter
from prefixes.files import write_text
from trainer.data.corpora import CorpusError, Pair, detokenize, held_out, read_dart, read_e2e, read_scitldr, read_webnlg
from trainer.data.xsum import read_xsum

Corpus = Literal["e2e", "webnlg", "dart", "scitldr", "xsum"]
Split = Literal["all", "train", "held-out"]
CORPORA: Final[tuple[Corpus, ...]] = get_args(Corpus)
SPLITS: Final[tuple[Split, ...]] = get_args(Split)


@dataclass(frozen=True)
class Conversion:
    """How to convert. ``without`` leaves out DART annotation sources, ``clean`` undoes E2E's tokenisation,
    ``paper_spaces`` writes `` source`` and `` target ``.
    """

    corpus: Corpus
    split: Split = "all"
    reverse: bool = False
    lower: bool = False
    clean: bool = False
    paper_spaces: bool = False
    without: tuple[str, ...] = ()
    sample: int | None = None  # number of lines, drawn with ``seed``, kept in the corpus's order; None for all
    seed: int = 1

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise InvalidParameter(f"sample: expected at least 1 line, got {self.sample}", got=self.sample)
        if self.without and self.corpus != "dart":
            raise InvalidParameter(f"without: only DART has annotation sources, got the corpus {self.corpus!r}")
        if self.clean and self.corpus != "e2e":
            raise InvalidParameter(f"clean: only E2E's texts are tokenised, got the corpus {self.corpus!r}")


READERS: Final[Mapping[Corpus, Callable[[Conversion, Path], Iterator[Pair]]]] = {
    "e2e": lambda _, source: read_e2e(source),
    "webnlg": lambda _, source: read_webnlg(source),
    "dart": lambda conversion, source: read_dart(source, without=conversion.without),
    "scitldr": lambda _, source: read_scitldr(source),
    "xsum": lambda _, source: read_xsum(source),
}


@dataclass(frozen=True)
class Counts:
    """The numbers of inputs and lines that were written."""

    inputs: int
    lines: int


def convert(conversion: Conversion, source: Path, output: Path) -> Counts:
    """Convert ``source`` to ``output``, written whole or not at all. Raises CorpusError, InvalidParameter."""
    records = list(_records(conversion, source))
    if not records:
        raise CorpusError(f"{source}: no reference is left after --split {conversion.split} and --without")
    if conversion.sample is not None:
        if conversion.sample > len(records):
            raise InvalidParameter(f"sample: expected at most {len(records)} lines, got {conversion.sample}")
        chosen = random.Random(conversion.seed).sample(range(len(records)), conversion.sample)
        records = [records[index] for index in sorted(chosen)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(json.dumps({"input": i, "target": t}, ensure_ascii=False) + "\n" for i, t in records))
    return Counts(len({text for text, _ in records}), len(records))


def _records(conversion: Conversion, source: Path) -> Iterator[tuple[str, str]]:
    for pair in READERS[conversion.corpus](conversion, source):
        if conversion.split != "all" and held_out(pair.source) != (conversion.split == "held-out"):
            continue
        sentence = detokenize(pair.target) if conversion.clean else pair.target
        sentence = sentence.lower() if conversion.lower else sentence
        text, target = (sentence, pair.source) if conversion.reverse else (pair.source, sentence)
        # With the template `{input} <|endoftext|>` these spaces give ` {source} <|endoftext|> {target} <|endoftext|>`.
        yield (f" {text}", f" {target} ") if conversion.paper_spaces else (text, target)
