"""BART's noise (Lewis et al. 2020): text infilling over token ids, sentence permutation over text.

Owns how a document is corrupted; knows no corpus, no tokenizer and no model.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

MASKED_SHARE = 0.3  # of the tokens
MEAN_SPAN = 3.0

# A full stop ends a sentence only before a capital: not in "et al. (2016)" or "0.5 points".
_SENTENCE_END = re.compile(r"""(?<=[.!?]) (?=["'(\[]?[A-Z£])""")


def infill(ids: Sequence[int], mask: int, rng: random.Random) -> list[int]:
    """Hide ``round(0.3 * len(ids))`` of ``ids`` in spans of Poisson(3) lengths, each replaced by a single ``mask``.

    A span of length 0 inserts a mask. No two spans touch: a kept token lies between them. The last span drawn is cut to
    the number of tokens left to hide.
    """
    hidden = round(MASKED_SHARE * len(ids))
    gaps = len(ids) - hidden + 1  # before, between and after the kept tokens
    lengths: list[int] = []
    insertions_left = gaps - hidden  # spans of length 0 that leave a gap for every other span
    left = hidden
    while left:
        length = min(_poisson(rng), left)
        if length == 0:
            if insertions_left == 0:
                continue
            insertions_left -= 1
        lengths.append(length)
        left -= length
    rng.shuffle(lengths)  # otherwise the cut span would always be the last
    corrupted: list[int] = []
    position = kept = 0
    for gap, length in zip(sorted(rng.sample(range(gaps), len(lengths))), lengths, strict=True):
        corrupted += [*ids[position : position + gap - kept], mask]
        position += gap - kept + length
        kept = gap
    return [*corrupted, *ids[position:]]


def permute_sentences(text: str, rng: random.Random) -> str:
    """Put the sentences of ``text`` in random order."""
    parts = sentences(text)
    rng.shuffle(parts)
    return " ".join(parts)


def sentences(text: str) -> list[str]:
    """Split ``text`` into sentences; single spaces join them again."""
    return _SENTENCE_END.split(text)


def _poisson(rng: random.Random) -> int:
    """Draw a Poisson variate with mean ``MEAN_SPAN`` by multiplying uniforms (Knuth)."""
    count, product = 0, rng.random()
    while product > math.exp(-MEAN_SPAN):
        count, product = count + 1, product * rng.random()
    return count
