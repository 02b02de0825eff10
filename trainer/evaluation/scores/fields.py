"""F1 over exact ``field : value`` parts, for texts turned into tables. Owns what a part is; knows no corpus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.evaluation.scores.base import Corpus, Floats, Score, mean_score


def fields(corpus: Corpus) -> list[Score]:
    """Micro precision, recall and F1 over exact parts between ``|``, and the share of exact outputs; 0 to 1.

    Of several references the best one counts, by F1.
    """
    rows, exact = [], []
    for output, texts in zip(corpus.outputs, corpus.references, strict=True):
        got = _parts(output)
        best = max((_parts(text) for text in texts), key=lambda parts: _f1(len(got & parts), len(got), len(parts)))
        rows.append((len(got & best), len(got), len(best)))
        exact.append(float(got == best))
    counts = np.asarray(rows, np.float64)  # (inputs, 3): right, made, wanted
    one_by_one = [_f1(*row) for row in rows]

    def score(name: str, of_sums: Callable[[Floats], Floats]) -> Score:
        value = float(of_sums(counts.sum(axis=0, keepdims=True))[0])
        return Score(name, value, one_by_one if name == "f1" else None, statistics=counts, of_sums=of_sums)

    return [
        score("f1", lambda sums: 2 * sums[:, 0] / np.maximum(1, sums[:, 1] + sums[:, 2])),
        score("precision", lambda sums: sums[:, 0] / np.maximum(1, sums[:, 1])),
        score("recall", lambda sums: sums[:, 0] / np.maximum(1, sums[:, 2])),
        mean_score("exact", exact),
    ]


def _f1(right: int, made: int, wanted: int) -> float:
    return 2 * right / max(1, made + wanted)


def _parts(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split("|") if part.strip())
