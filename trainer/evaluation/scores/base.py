"""The input and output of every metric: a corpus, and named scores with the statistics that a resample needs.

Owns these types and the errors that metrics share; knows no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefixes.errors import InvalidParameter, PrefixdError

Floats = NDArray[np.float64]


class ScorerMissing(PrefixdError):
    """A metric needs a package or a program that is not installed."""

    code = "scorer_missing"


@dataclass(frozen=True)
class Corpus:
    """One output per input and that input's references, at least one. Raises InvalidParameter."""

    outputs: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.outputs or len(self.outputs) != len(self.references):
            raise InvalidParameter(
                f"scores: expected as many outputs as groups of references, at least one, got {len(self.outputs)} and "
                f"{len(self.references)}"
            )
        for index, texts in enumerate(self.references):
            if not texts:
                raise InvalidParameter(f"scores: input {index + 1}: expected at least one reference, got none")

    @classmethod
    def of(cls, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Corpus:
        return cls(tuple(outputs), tuple(tuple(texts) for texts in references))

    def mapped(self, prepare: Callable[[str], str]) -> Corpus:
        """Apply ``prepare`` to every text: first to the outputs, then to the references, in order."""
        outputs = [prepare(text) for text in self.outputs]  # ``prepare`` may rely on this order
        return Corpus.of(outputs, [[prepare(text) for text in texts] for texts in self.references])

    def with_at_most(self, references: int | None) -> Corpus:
        """Keep only the first ``references`` of each input; None keeps all."""
        return Corpus(self.outputs, tuple(texts[:references] for texts in self.references))


@dataclass(frozen=True)
class Score:
    """One named score of a corpus.

    ``per_input`` is the score of each input alone, to rank outputs by, if that has a meaning. ``statistics``
    ``(inputs, n)`` add up over inputs, and ``of_sums`` turns sums ``(samples, n)`` into scores ``(samples,)``, which
    makes the scores of resamples cheap. Both are None if the score does not decompose into such sums.
    """

    name: str
    value: float
    per_input: Sequence[float] | None = None
    lower_is_better: bool = False
    statistics: Floats | None = None
    of_sums: Callable[[Floats], Floats] | None = None


def mean_score(name: str, per_input: Sequence[float]) -> Score:
    """Return the mean over inputs as a score."""
    column = np.asarray(per_input, np.float64)
    return Score(
        name,
        float(column.mean()),
        per_input=column.tolist(),
        statistics=np.stack([column, np.ones_like(column)], axis=1),
        of_sums=lambda sums: sums[:, 0] / sums[:, 1],
    )
