"""BLEU, TER and chrF by sacreBLEU, and the settings under which its BLEU is mteval-v13a's and multi-bleu's.

Owns those settings and how sacreBLEU's statistics become resamples; the arithmetic is the package's.

- ``tokenize="13a", lowercase=True, smooth="exp"`` is mteval-v13a, case-insensitive, as E2E's scorer runs it: on the
  example pair of that scorer both give 72.03. Without lower-casing it is 67.83, with the tokenizer ``intl`` 73.93.
- ``tokenize="none", lowercase=True, smooth="none"`` is ``multi-bleu.perl -lc``: words between spaces, 0 where one order
  of n-grams has no match.
- ``pad_references``: multi-bleu reads references as files with a line for every input, and an input that has fewer
  references than another gets empty lines. An empty line counts as a reference of length 0 when the closest length is
  sought, which spares an output of less than half of its shortest reference the brevity penalty. To equal multi-bleu
  so do we under its settings; elsewhere a missing reference is none, as in E2E's scorer.
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
    """See the module. BLEU is of 1- to 4-grams, 0 to 100."""

    tokenize: Literal["13a", "none"] = "13a"
    lowercase: bool = True
    smooth: Literal["exp", "none"] = "exp"
    pad_references: bool = False


def bleu(corpus: Corpus, settings: BleuSettings) -> Score:
    """Corpus BLEU against all references; each input's with smoothing and the effective order."""
    metric = BLEU(
        tokenize=settings.tokenize, lowercase=settings.lowercase, smooth_method=settings.smooth, force=True
    )  # force: no warning of texts that are split already

    def of_one(row: list[float]) -> float:
        counts = [int(count) for count in row]
        length, reference, matches, totals = counts[0], counts[1], counts[2:6], counts[6:]
        return float(BLEU.compute_bleu(matches, totals, length, reference, "exp", effective_order=True).score)

    return _score("bleu", metric, corpus, of_one=of_one, missing="" if settings.pad_references else None)


def ter(corpus: Corpus) -> Score:
    """Translation edit rate, 0 and up, lower is better: edits to the nearest reference over the mean length of all."""
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
    """The statistics are those that sacreBLEU's own bootstrap adds up; a test holds the value to ``corpus_score``."""
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
