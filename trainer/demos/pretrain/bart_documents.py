"""The demo BART's training documents: noised texts of E2E, DART and SciTLDR that it learns to restore.

Owns the mixture of documents and their token form; ``noise`` owns the noise; knows no model. A document is a table or
an abstract, its sentences or summary, or both, joined by `` ||``. The target is always the whole document. The input is
the document under infilling and sentence permutation. In the ``hidden`` kinds it is the document with one of its two
parts hidden as a single long span: ``<mask> ||{table}`` or ``{table} ||<mask>``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.corpora import Pair
from trainer.demos.pretrain.noise import infill, permute_sentences
from trainer.demos.pretrain.tables import SHUFFLED_SHARE, Corpora, rename, shuffle_fields

SEPARATOR = " ||"
TABLE_KINDS = {"target": 0.12, "source": 0.08, "both": 0.25, "hidden target": 0.40, "hidden source": 0.15}
PAPER_KINDS = {"target": 0.12, "source": 0.28, "both": 0.25, "hidden target": 0.30, "hidden source": 0.05}
DART_SHARE = 0.17  # of the documents from tables; the rest is E2E
FIRST_SCITLDR_SHARE, LAST_SCITLDR_SHARE = 0.12, 0.30  # of the documents, in the first and the second half of the budget
RENAMED_SHARE = 0.4
HIDDEN_FIRST_SHARE = 0.8  # generated from the encoder's input alone; the rest comes behind a copy of the other part
PERMUTED_SHARE = 0.5  # not all: served inputs have their sentences in order


@dataclass(frozen=True)
class Document:
    """One or two parts. ``permuted`` has the same parts with their sentences in the input's order. ``hidden`` is the
    index of the part that the input lacks."""

    parts: tuple[str, ...]
    permuted: tuple[str, ...]
    hidden: int | None = None


@dataclass(frozen=True)
class Example:
    """Token ids of the encoder's input and of the decoder's output, both from ``<s>`` to ``</s>``. The loss is on the
    first ``learnt`` tokens of the target."""

    corrupted: list[int]
    target: list[int]
    learnt: int

    @property
    def size(self) -> int:
        """Tokens of both sides."""
        return len(self.corrupted) + len(self.target)


def draw(corpora: Corpora, names: Sequence[str], rng: random.Random, fraction: float) -> Document:
    """Draw a training document at ``fraction`` of the budget. More tables come early: short ones teach to copy first.

    A share of E2E gets other names, and a share of E2E and DART another order of fields.
    """
    papers = FIRST_SCITLDR_SHARE if fraction < 0.5 else LAST_SCITLDR_SHARE
    shares = ((1 - papers) * (1 - DART_SHARE), (1 - papers) * DART_SHARE, papers)
    pairs = rng.choices((corpora.e2e, corpora.dart, corpora.scitldr), shares)[0]
    pair = rng.choice(pairs)
    kinds = PAPER_KINDS if pairs is corpora.scitldr else TABLE_KINDS
    if pairs is corpora.e2e and rng.random() < RENAMED_SHARE:
        pair = rename(pair, names, rng)
    if pairs is not corpora.scitldr and rng.random() < SHUFFLED_SHARE:
        pair = shuffle_fields(pair, rng)
    return document(pair, rng.choices(list(kinds), list(kinds.values()))[0], rng)


def document(pair: Pair, kind: str, rng: random.Random) -> Document:
    """Turn ``pair`` into a document of ``kind``, a key of ``TABLE_KINDS`` or ``PAPER_KINDS``."""
    if kind in ("target", "source"):
        parts: tuple[str, ...] = (getattr(pair, kind),)
    else:
        parts = (pair.target, pair.source)
    if kind.startswith("hidden"):
        hidden = 0 if kind == "hidden target" else 1
        if (hidden == 0) != (rng.random() < HIDDEN_FIRST_SHARE):
            return Document(parts[::-1], parts[::-1], 1 - hidden)
        return Document(parts, parts, hidden)
    if rng.random() < 0.5:
        parts = parts[::-1]
    permute = rng.random() < PERMUTED_SHARE
    return Document(parts, tuple(permute_sentences(part, rng) for part in parts) if permute else parts)


def encode(tokenizer: Any, documents: Sequence[Document], limit: int, rng: random.Random) -> list[Example]:
    """Encode and noise documents; leave out those of more than ``limit`` tokens.

    Every part is encoded separately, as the server encodes a template and its input.
    """
    pieces = [piece for doc in documents for piece in (*doc.parts, *doc.permuted)]
    encoded = iter(tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"])  # long ones are left out
    separator = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    start, end, mask = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id
    made = []
    for doc in documents:
        parts = [next(encoded) for _ in doc.parts]
        permuted = [next(encoded) for _ in doc.permuted]
        target = [start, *_joined(parts, separator), end]
        if doc.hidden is None:
            corrupted = infill(_joined(permuted, separator), mask, rng)
        else:
            corrupted = _joined([[mask] if i == doc.hidden else ids for i, ids in enumerate(parts)], separator)
        if max(len(target), len(corrupted) + 2) <= limit:
            made.append(Example([start, *corrupted, end], target, len(target)))
    return made


def _joined(parts: Sequence[list[int]], separator: list[int]) -> list[int]:
    joined = list(parts[0])
    for part in parts[1:]:
        joined += [*separator, *part]
    return joined
