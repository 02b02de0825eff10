"""The report of a run: what happened, how good the result is, what it cost, where it came from.

Owns what the report says and its JSON, a superset of the run's own ``report.json``; ``report_html`` shows it. Texts in
it come from outside and are data: nothing here may be taken for markup, a path or a command.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from prefixes.errors import InvalidParameter
from prefixes.files import write_json, write_text
from trainer.evaluation.evaluate import Evaluation, ScoredOutput
from trainer.reports.html import render_html

SHOWN: Final = 10
MAX_CHARACTERS: Final = 4000  # of one text in the report; an input may be a megabyte
MAX_REFERENCES: Final = 8
_OURS: Final = ("task", "cost", "metrics", "evaluation", "worst", "random")


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
                facts={key: value for key, value in document.items() if key not in _OURS},
                metrics=tuple(document["metrics"]),
                task=document["task"],
                cost=document["cost"],
                evaluation=document["evaluation"],
                worst=tuple(map(ScoredOutput.from_dict, document["worst"])),
                random=tuple(map(ScoredOutput.from_dict, document["random"])),
            )
        except (KeyError, TypeError) as error:
            raise InvalidParameter(f"report: expected its own JSON, got {type(error).__name__}: {error}") from None


def build_report(
    facts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None = None,
    *,
    task: str | None = None,
    cost: Mapping[str, float] | None = None,
    seed: int = 1,
) -> Report:
    """The report of a run with these facts and metrics: ten worst outputs, and ten drawn with ``seed``.

    Both are in the order of the test set where nothing ranks them; long texts are cut, and say so.
    """
    outputs = evaluation.outputs if evaluation else ()
    ranked = sorted((output for output in outputs if output.score is not None), key=lambda output: output.score or 0.0)
    drawn = sorted(random.Random(seed).sample(range(len(outputs)), min(SHOWN, len(outputs))))
    return Report(
        facts={key: value for key, value in facts.items() if key not in _OURS},
        metrics=tuple(metrics),
        task=task,
        cost=dict(cost or {}),
        evaluation=None if evaluation is None else evaluation.summary(),
        worst=tuple(map(_shown, ranked[:SHOWN])),
        random=tuple(_shown(outputs[index]) for index in drawn),
    )


def report_of(
    folder: Path,
    evaluation: Evaluation | None = None,
    *,
    task: str | None = None,
    cost: Mapping[str, float] | None = None,
) -> Report:
    """The report of the finished run in ``folder``. Raises InvalidParameter where there is none."""
    try:
        facts = json.loads((folder / "report.json").read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InvalidParameter(f"report: expected a finished run, got {type(error).__name__}") from error
    return build_report(facts, metrics, evaluation, task=task, cost=cost)


def write_reports(folder: Path, report: Report) -> None:
    """``report.html`` and ``report.json`` in ``folder``, which is there, each whole or not at all."""
    write_text(folder / "report.html", render_html(report))
    write_json(folder / "report.json", report.as_dict())


def _shown(output: ScoredOutput) -> ScoredOutput:
    references = [_cut(text) for text in output.references[:MAX_REFERENCES]]
    if len(output.references) > MAX_REFERENCES:
        references.append(f"… and {len(output.references) - MAX_REFERENCES} more")
    return replace(output, input=_cut(output.input), output=_cut(output.output), references=tuple(references))


def _cut(text: str) -> str:
    left = len(text) - MAX_CHARACTERS
    return text if left <= 0 else f"{text[:MAX_CHARACTERS]}… ({left} more characters)"
