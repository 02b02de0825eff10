"""The work on pairs that both pretrainings share: reads them, holds some out, varies their tables, batches documents.

Owns the choice of pairs and the variation of names and fields; knows no tokenizer and no model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer.data.corpora import Pair, detokenize, held_out, read_dart, read_e2e, read_scitldr

SHUFFLED_SHARE = 0.25

T = TypeVar("T")


@dataclass(frozen=True)
class Corpora:
    """Pairs by corpus."""

    e2e: Sequence[Pair]
    dart: Sequence[Pair]
    scitldr: Sequence[Pair] = ()

    def __str__(self) -> str:
        counts = ((self.e2e, "E2E"), (self.dart, "DART"), (self.scitldr, "SciTLDR"))
        return ", ".join(f"{len(pairs)} {name}" for pairs, name in counts if pairs)


def read_corpora(e2e: Path, dart: Path, scitldr: Path | None = None) -> tuple[Corpora, Corpora]:
    """Return the pairs to learn from, and the pairs of held-out sources.

    E2E's texts are detokenised; DART's pairs from WebNLG are left out. Raises CorpusError.
    """
    tables = [Pair(pair.source, detokenize(pair.target), pair.origin) for pair in read_e2e(e2e)]
    triples = list(read_dart(dart, without=("webnlg",)))
    papers = list(read_scitldr(scitldr)) if scitldr else []
    kept, apart = (
        [[pair for pair in pairs if held_out(pair.source) == wanted] for pairs in (tables, triples, papers)]
        for wanted in (False, True)
    )
    return Corpora(*kept), Corpora(*apart)


def rename(pair: Pair, names: Sequence[str], rng: random.Random) -> Pair:
    """Replace the proper names of ``pair``, so that the model copies names instead of memorising them."""
    source, target = pair.source, pair.target
    for part in pair.source.split(" | "):
        field, _, value = part.partition(" : ")
        if names and field in ("name", "near") and value in target:
            other = rng.choice(names)
            if other not in source:
                source = source.replace(part, f"{field} : {other}")
                target = target.replace(value, other)
    return Pair(source, target, pair.origin)


def proper_names(e2e: Sequence[Pair], dart: Sequence[Pair], rng: random.Random, count: int = 4000) -> list[str]:
    """Invent up to ``count`` names of one to three capitalised words from the corpora."""
    every = {word for pair in [*e2e, *dart] for word in pair.source.split()}
    words = sorted(word for word in every if word.isalpha() and word.istitle())
    names: set[str] = set()
    for _ in range(20 * count):  # a bound: a small vocabulary may not give ``count`` names
        if len(names) == count or not words:
            break
        name = " ".join(rng.choice(words) for _ in range(rng.choice((1, 2, 2, 3))))
        names.add(f"The {name}" if rng.random() < 0.3 else name)
    return sorted(names)


def shuffle_fields(pair: Pair, rng: random.Random) -> Pair:
    """Put the fields or triples of the pair's source in random order."""
    parts = pair.source.split(" | ")
    rng.shuffle(parts)
    return Pair(" | ".join(parts), pair.target, pair.origin)


def batches(documents: Sequence[T], size: Callable[[T], int], tokens: int, rng: random.Random) -> Iterator[list[T]]:
    """Yield batches of documents of similar ``size``, each of at most ``tokens`` padded tokens, in random order.

    A single longer document is a batch of its own.
    """
    ordered = sorted(documents, key=lambda document: (size(document), rng.random()))
    made: list[list[T]] = [[]]
    for document in ordered:
        if (len(made[-1]) + 1) * size(document) > tokens and made[-1]:
            made.append([])
        made[-1].append(document)
    rng.shuffle(made)
    yield from made
