"""The gate's inputs: of those that it has, the ones that neither version has seen.

Owns which inputs are left out, and why. Knows no model and no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from trainer.data.dataset import Dataset
from trainer.data.seen import SeenInputs, digest_of
from trainer.evaluation.evaluate import references
from trainer.evaluation.scores.presets import ScorePreset

MOST_INPUTS: Final = 1000
"""Of more inputs those with the least digests are scored: the same ones for every version."""


@dataclass(frozen=True)
class LeftOut:
    """How many inputs are not scored.

    The new version has seen some, the current version others, of ``unknown`` ones a version does not tell, and
    ``surplus`` ones are too many.
    """

    new: int = 0
    current: int = 0
    unknown: int = 0
    surplus: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def gate_set(
    data: Dataset, preset: ScorePreset, new: SeenInputs, current: SeenInputs | None
) -> tuple[Mapping[str, Sequence[str]], LeftOut]:
    """Return the inputs with their references, and how many were left out.

    ``current`` None is a version that tells nothing of what it has seen: nothing is left out for it.
    """
    kept: dict[str, Sequence[str]] = {}
    left = dict.fromkeys(("new", "current", "unknown"), 0)
    for text, expected in references(data, preset).items():
        if text in new:
            left["new"] += 1
        elif current is not None and text in current:
            left["current"] += 1
        elif not (new.tells_of(text) and (current is None or current.tells_of(text))):
            left["unknown"] += 1
        else:
            kept[text] = expected
    first = sorted(kept, key=lambda text: (digest_of(text), text))[:MOST_INPUTS]
    return {text: kept[text] for text in first}, LeftOut(**left, surplus=len(kept) - len(first))
