"""The content of a report: the course of a run, the scores of the result, its cost and its origin.

Owns the report's fields and their JSON, a superset of the run's ``report.json``; knows no HTML. Its texts come from
outside: never treat them as markup, a path or a command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefixes.errors import InvalidParameter
from trainer.evaluation.evaluate import ScoredOutput

ADDED: Final = ("task", "cost", "metrics", "evaluation", "gate", "worst", "random")
"""The keys that a report adds to the run's facts."""


@dataclass(frozen=True)
class Report:
    """``facts`` are the run's: version, digests, hyperparameters, time. ``metrics`` are its lines with step, epoch,
    loss, learning_rate and perhaps validation_loss; empty without training. ``cost`` has the known ones of seconds,
    tokens, tokens_per_second and peak_memory_bytes. ``evaluation`` is a summary without texts, ``gate`` an outcome.
    """

    facts: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    task: str | None
    cost: Mapping[str, float]
    evaluation: Mapping[str, Any] | None
    worst: tuple[ScoredOutput, ...]
    random: tuple[ScoredOutput, ...]
    gate: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the facts and the added keys at one level. ``from_dict`` takes them back."""
        return {
            **self.facts,
            "task": self.task,
            "cost": dict(self.cost),
            "metrics": [dict(line) for line in self.metrics],
            "evaluation": None if self.evaluation is None else dict(self.evaluation),
            "gate": None if self.gate is None else dict(self.gate),
            "worst": [output.as_dict() for output in self.worst],
            "random": [output.as_dict() for output in self.random],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Report:
        """Read what ``as_dict`` wrote. Raises InvalidParameter for anything else."""
        try:
            return cls(
                facts={key: value for key, value in document.items() if key not in ADDED},
                metrics=tuple(document["metrics"]),
                task=document["task"],
                cost=document["cost"],
                evaluation=document["evaluation"],
                gate=document.get("gate"),  # a report of an older release lacks it
                worst=tuple(map(ScoredOutput.from_dict, document["worst"])),
                random=tuple(map(ScoredOutput.from_dict, document["random"])),
            )
        except (KeyError, TypeError) as error:
            raise InvalidParameter(f"report: expected its own JSON, got {type(error).__name__}: {error}") from None
