"""ROUGE of summaries against one or several references.

Owns how several references become one score; the arithmetic is the package ``rouge-score``'s, with stemming, as in the
paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefixes.errors import InvalidParameter

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(outputs: Sequence[str], expected: Sequence[Sequence[str]]) -> Mapping[str, float]:
    """F1 of ROUGE-1, -2 and -L, 0 to 100, mean over the outputs.

    Of several references the one with the best ROUGE-1 counts, for all three, as SciTLDR's own scorer takes it.
    Raises InvalidParameter where the package is not installed.
    """
    scorer = _scorer()
    totals = dict.fromkeys(KINDS, 0.0)
    for output, references in zip(outputs, expected, strict=True):
        scores = [scorer.score(reference, output) for reference in references]
        best = max(scores, key=lambda score: score["rouge1"].fmeasure)
        for kind in KINDS:
            totals[kind] += best[kind].fmeasure
    return {kind: 100 * total / len(outputs) for kind, total in totals.items()}


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InvalidParameter(
            "metric 'rouge': expected the package rouge-score, found none (pip install rouge-score)"
        ) from error
    return RougeScorer(list(KINDS), use_stemmer=True)
