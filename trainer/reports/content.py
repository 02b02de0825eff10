"""What a report says: what happened in a run, how good the result is, what it cost, where it came from.

Owns the report's fields and their JSON, a superset of the run's own ``report.json``. Texts in it come from outside and
are data: nothing here may be taken for markup, a path or a command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefixes.errors import InvalidParameter
from trainer.evaluation.evaluate import ScoredOutput

ADDED: Final = ("task", "cost", "metrics", "evaluation", "worst", "random")
"""The names beside the run's own facts."""


@dataclass(frozen=True)
class Report:
    """``facts`` are the run's own: version, digests, hyperparameters, time. ``metrics`` are its lines: step, epoch,
    loss, learning_rate and perhaps validation_loss each; none where nothing was trained. ``cost`` names seconds,
    tokens, tokens_per_second, peak_memory_bytes, each only where it is known. ``evaluation`` is a summary, without
    texts.
    """

    facts: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    task: str | None
    cost: Mapping[str, float]
    evaluation: Mapping[str, Any] | None
    worst: tuple[ScoredOutput, ...]
    random: tuple[ScoredOutput, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the facts at the top, beside them what the report adds. ``from_dict`` takes them back."""
        return {
            **self.facts,
            "task": self.task,
            "cost": dict(self.cost),
            "metrics": [dict(line) for line in self.metrics],
            "evaluation": None if self.evaluation is None else dict(self.evaluation),
            "worst": [output.as_dict() for output in self.worst],
            "random": [output.as_dict() for output in self.random],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Report:
        """Raises InvalidParameter for what ``as_dict`` did not make."""
        try:
            return cls(
                facts={key: value for key, value in document.items() if key not in ADDED},
                metrics=tuple(document["metrics"]),
                task=document["task"],
                cost=document["cost"],
                evaluation=document["evaluation"],
                worst=tuple(map(ScoredOutput.from_dict, document["worst"])),
                random=tuple(map(ScoredOutput.from_dict, document["random"])),
            )
        except (KeyError, TypeError) as error:
            raise InvalidParameter(f"report: expected its own JSON, got {type(error).__name__}: {error}") from None
