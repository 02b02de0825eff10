"""ROUGE of summaries against one or several references.

Owns how several references become one score; the package ``rouge-score`` has the arithmetic, with stemming as in the
paper.
"""

from __future__ import annotations

from typing import Final

from trainer.evaluation.scores.base import Corpus, Score, mean_score

KINDS: Final = ("rouge1", "rouge2", "rougeL")


def rouge(corpus: Corpus) -> list[Score]:
    """F1 of ROUGE-1, -2 and -L, 0 to 100, mean over the inputs.

    Of several references the one with the best ROUGE-1 counts for all three, as in SciTLDR's scorer.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second; imported here so that only scoring waits

    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    columns: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for output, references in zip(corpus.outputs, corpus.references, strict=True):
        scores = [scorer.score(reference, output) for reference in references]
        best = max(scores, key=lambda score: score["rouge1"].fmeasure)
        for kind in KINDS:
            columns[kind].append(100 * best[kind].fmeasure)
    return [mean_score(kind, column) for kind, column in columns.items()]
