"""The eval gate: scores a new version and the current one by the engine that serves, and says which is to be served.

Owns the order of work and the outcome's fields. The rule is ``gate_rule``'s, the inputs are ``gate_set``'s. Knows no
registry: whoever asks brings the current version, and moves the alias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefixes.artifact import Prefix, version_of
from prefixes.backbone import Backbone
from prefixes.errors import IncompatiblePrefix
from prefixes.spec import check_compatible
from trainer.data.dataset import Dataset
from trainer.data.seen import SeenInputs, seen_by
from trainer.evaluation.gate_rule import (
    LEAST_INPUTS,
    METRIC_OF,
    Comparison,
    Rule,
    Verdict,
    compared,
    reason_of,
    verdict_of,
)
from trainer.evaluation.gate_set import LeftOut, gate_set
from trainer.evaluation.generate import Report, decoding, generate
from trainer.evaluation.scores.base import Corpus, Score
from trainer.evaluation.scores.presets import preset_of, scores_of


@dataclass(frozen=True)
class GateOutcome:
    """What the gate found. ``current`` is the version that was compared with, None where there was none.

    ``inputs_known``: whether both versions tell all the inputs that they were made on.
    """

    verdict: Verdict
    reason: str
    rule: Rule
    preset: str
    version: str
    current: str | None
    inputs_known: bool = True
    inputs: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    scores: Comparison | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values, of which a record, a report and an answer consist."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "rule": {"metric": self.rule.metric, "margin": self.rule.margin},
            "preset": self.preset,
            "version": self.version,
            "current": self.current,
            "inputs_known": self.inputs_known,
            "inputs": self.inputs,
            "left_out": self.left_out.as_dict(),
            "scores": None if self.scores is None else self.scores.as_dict(),
        }


@dataclass(frozen=True)
class Gate:
    """Judges one new version, made on the inputs ``seen``, by ``data``."""

    rule: Rule
    preset: str
    data: Dataset
    new: Prefix
    seen: SeenInputs

    def judge(
        self,
        backbone: Backbone,
        current: Prefix | None,
        *,
        threads: int | None = None,
        report: Report = lambda done, total: None,
    ) -> GateOutcome:
        """Score both versions, one after the other, and decide. ``report`` may raise to end the work.

        Raises ScorerMissing.
        """
        outcome = GateOutcome("undecided", "", self.rule, self.preset, version_of(self.new), None)
        if current is None:
            return replace(outcome, verdict="promoted", reason="there is no version whose place it would take")
        seen = seen_by(current.spec.origin)
        known = self.seen.whole and seen is not None and seen.whole
        outcome = replace(outcome, current=version_of(current), inputs_known=known)
        try:
            check_compatible(current.spec, backbone.spec)
        except IncompatiblePrefix:
            return replace(outcome, reason="the current version is of another backbone, so that none serves both")
        inputs, left_out = gate_set(self.data, preset_of(self.preset), self.seen, seen)
        outcome = replace(outcome, inputs=len(inputs), left_out=left_out)
        aside = "" if known else "; it is not known on which inputs both versions were made"
        if len(inputs) < LEAST_INPUTS:
            reason = (
                f"{len(inputs)} inputs are left and {LEAST_INPUTS} are needed; of the others {left_out.new} the new "
                f"version has seen, {left_out.current} the current one, and of {left_out.unknown} it is not known"
            )
            return replace(outcome, reason=reason + aside)
        new, old = (self._score(backbone, prefix, inputs, threads, report) for prefix in (self.new, current))
        found = compared(new, old)
        reason = reason_of(self.rule, found, len(inputs)) + aside
        return replace(outcome, verdict=verdict_of(self.rule, found), reason=reason, scores=found)

    def _score(
        self,
        backbone: Backbone,
        prefix: Prefix,
        inputs: Mapping[str, Sequence[str]],
        threads: int | None,
        report: Report,
    ) -> Score:
        """The rule's score of a version, decoded as the server does by default. Inputs past the window are cut."""
        params, _ = decoding(backbone, prefix, {})
        made = generate(backbone, prefix, list(inputs), params, truncate=True, threads=threads, report=report)
        corpus = Corpus.of([one.output.text for one in made], list(inputs.values()))
        scores = scores_of(corpus, preset_of(self.preset), (METRIC_OF[self.rule.metric],))
        return next(score for score in scores if score.name == self.rule.metric)
