"""What every metric takes and gives: a corpus in, named scores out, each with what a resample of its inputs needs.

Owns these shapes and the errors that metrics share; knows no metric.
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
    """One output per input, and that input's references, at least one. Raises InvalidParameter."""

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
        """Every text through ``prepare``."""
        outputs = [prepare(text) for text in self.outputs]  # first: ``prepare`` may go by the order
        return Corpus.of(outputs, [[prepare(text) for text in texts] for texts in self.references])

    def with_at_most(self, references: int | None) -> Corpus:
        """Only the first ``references`` of each input; None keeps all."""
        return Corpus(self.outputs, tuple(texts[:references] for texts in self.references))


@dataclass(frozen=True)
class Score:
    """One named score of a corpus.

    ``per_input`` is the same measure of each input alone, to rank outputs by, where it has a meaning there.
    ``statistics``, ``(inputs, n)``, add up over inputs, and ``of_sums`` makes ``(samples,)`` scores of ``(samples, n)``
    such sums: with both the score of a resample costs nothing. None where the score does not decompose so.
    """

    name: str
    value: float
    per_input: Sequence[float] | None = None
    lower_is_better: bool = False
    statistics: Floats | None = None
    of_sums: Callable[[Floats], Floats] | None = None


def mean_score(name: str, per_input: Sequence[float]) -> Score:
    """The mean over inputs."""
    column = np.asarray(per_input, np.float64)
    return Score(
        name,
        float(column.mean()),
        per_input=column.tolist(),
        statistics=np.stack([column, np.ones_like(column)], axis=1),
        of_sums=lambda sums: sums[:, 0] / sums[:, 1],
    )
