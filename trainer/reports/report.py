"""Makes the report of a run from its facts, metrics and evaluation, and writes it as HTML and JSON.

Owns which outputs the report shows and how long their texts may be. ``content`` owns its fields, ``html`` its page.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from prefixes.errors import InvalidParameter
from prefixes.files import write_json, write_text
from trainer.evaluation.evaluate import Evaluation, ScoredOutput
from trainer.reports.content import ADDED, Report
from trainer.reports.html import render_html

SHOWN: Final = 10
MAX_CHARACTERS: Final = 4000  # of one text in the report; an input may have a megabyte
MAX_REFERENCES: Final = 8


def build_report(
    facts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None = None,
    *,
    task: str | None = None,
    cost: Mapping[str, float] | None = None,
    gate: Mapping[str, Any] | None = None,
    seed: int = 1,
) -> Report:
    """Return the report of a run, with its ten worst outputs and ten drawn with ``seed``.

    The worst start with the lowest score; there are none if no score ranks outputs. The drawn ones keep the order of
    the test set. Long texts are cut and marked.
    """
    outputs = evaluation.outputs if evaluation else ()
    ranked = sorted((output for output in outputs if output.score is not None), key=lambda output: output.score or 0.0)
    drawn = sorted(random.Random(seed).sample(range(len(outputs)), min(SHOWN, len(outputs))))
    return Report(
        facts={key: value for key, value in facts.items() if key not in ADDED},
        metrics=tuple(metrics),
        task=task,
        cost=dict(cost or {}),
        evaluation=None if evaluation is None else evaluation.summary(),
        gate=gate,
        worst=tuple(map(_shown, ranked[:SHOWN])),
        random=tuple(_shown(outputs[index]) for index in drawn),
    )


def report_of(
    folder: Path,
    evaluation: Evaluation | None = None,
    *,
    task: str | None = None,
    cost: Mapping[str, float] | None = None,
    gate: Mapping[str, Any] | None = None,
) -> Report:
    """Return the report of the finished run in ``folder``. Raises InvalidParameter if there is none."""
    try:
        facts = json.loads((folder / "report.json").read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InvalidParameter(f"report: expected a finished run, got {type(error).__name__}") from error
    return build_report(facts, metrics, evaluation, task=task, cost=cost, gate=gate)


def write_reports(folder: Path, report: Report) -> None:
    """Write ``report.html`` and ``report.json`` to the existing ``folder``, each whole or not at all."""
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
