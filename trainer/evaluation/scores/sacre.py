"""BLEU, TER and chrF by sacreBLEU, and the settings that make its BLEU equal mteval-v13a and multi-bleu.

Owns those settings and how sacreBLEU's statistics serve resamples; the package has the arithmetic.

- ``tokenize="13a", lowercase=True, smooth="exp"`` is mteval-v13a, case-insensitive, as in E2E's scorer: both give 72.03
  on that scorer's example pair. Without lower-casing it is 67.83, with the tokenizer ``intl`` 73.93.
- ``tokenize="none", lowercase=True, smooth="none"`` is ``multi-bleu.perl -lc``: it splits at spaces, and gives 0 if one
  order of n-grams has no match.
- ``pad_references``: multi-bleu reads references from files with a line per input; an input with fewer references gets
  empty lines. An empty line counts as a reference of length 0 in the search for the closest length. So an output of
  less than half its shortest reference gets no brevity penalty. multi-bleu's settings do the same here; without
  ``pad_references`` a missing reference does not count, as in E2E's scorer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from trainer.evaluation.scores.base import Corpus, Floats, Score


@dataclass(frozen=True)
class BleuSettings:
    """See the module. BLEU takes 1- to 4-grams and runs from 0 to 100."""

    tokenize: Literal["13a", "none"] = "13a"
    lowercase: bool = True
    smooth: Literal["exp", "none"] = "exp"
    pad_references: bool = False


def bleu(corpus: Corpus, settings: BleuSettings) -> Score:
    """Corpus BLEU against all references. The score of a single input uses smoothing and the effective order."""
    metric = BLEU(
        tokenize=settings.tokenize, lowercase=settings.lowercase, smooth_method=settings.smooth, force=True
    )  # force: no warning about texts that are already tokenised

    def of_one(row: list[float]) -> float:
        counts = [int(count) for count in row]
        length, reference, matches, totals = counts[0], counts[1], counts[2:6], counts[6:]
        return float(BLEU.compute_bleu(matches, totals, length, reference, "exp", effective_order=True).score)

    return _score("bleu", metric, corpus, of_one=of_one, missing="" if settings.pad_references else None)


def ter(corpus: Corpus) -> Score:
    """Translation edit rate, 0 and up, lower is better: edits to the nearest reference over their mean length."""
    return _score("ter", TER(), corpus, lower_is_better=True)


def chrf(corpus: Corpus) -> Score:
    """chrF2, 0 to 100: character 1- to 6-grams of the best reference."""
    return _score("chrf", CHRF(), corpus)


def _score(
    name: str,
    metric: Any,
    corpus: Corpus,
    *,
    of_one: Callable[[list[float]], float] | None = None,
    missing: str | None = None,
    lower_is_better: bool = False,
) -> Score:
    """Compute a score from the statistics of sacreBLEU's bootstrap; a test compares it with ``corpus_score``."""
    most = max(len(texts) for texts in corpus.references)
    streams = [[texts[i] if i < len(texts) else missing for texts in corpus.references] for i in range(most)]
    rows = np.asarray(metric._extract_corpus_statistics(list(corpus.outputs), streams), np.float64)

    def of_sum(row: list[float]) -> float:
        return float(metric._compute_score_from_stats(row).score)

    def of_sums(sums: Floats) -> Floats:
        return np.asarray([of_sum(row) for row in sums.tolist()])

    return Score(
        name,
        of_sum(rows.sum(axis=0).tolist()),
        per_input=[(of_one or of_sum)(row) for row in rows.tolist()],
        lower_is_better=lower_is_better,
        statistics=rows,
        of_sums=of_sums,
    )
