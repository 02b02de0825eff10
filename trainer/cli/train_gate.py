"""The gate of ``prefixd train``: judges a finished run against what the target's alias points at, and publishes it.

Owns the check of the options and the order of judging and publishing. ``evaluation.gate`` judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from prefixes.artifact import read_prefix
from prefixes.backbone import load_backbone
from prefixes.errors import InvalidParameter
from prefixes.files import write_json
from prefixes.spec import TaskRef
from trainer.data.dataset import read_dataset
from trainer.evaluation.gate_rule import METRIC_OF, MOST_MOVES, Rule, after_moves, check_inputs
from trainer.evaluation.scores.presets import metrics_of, preset_of
from trainer.training.gate import gate_of
from trainer.training.publish import AliasMoved, Targets
from trainer.training.request import RunRequest
from trainer.training.run import RunResult

PRESET: Final = "plain"
"""How texts are scored."""


@dataclass(frozen=True)
class TrainGate:
    """What to decide by. ``data`` None is the share of the inputs that the run holds out for its gate."""

    rule: Rule
    data: Path | None

    @classmethod
    def of(
        cls, metric: str | None, margin: float | None, data: Path | None, hold_out: int, alias: str, targets: Targets
    ) -> TrainGate | None:
        """Return the options' gate, None without a rule. Raises InvalidParameter, InvalidData, ScorerMissing."""
        check_inputs(metric is not None, data is not None, hold_out)
        if metric is None:
            if margin is not None:
                raise InvalidParameter("--margin: expected --promote-if beside it", got=margin)
            return None
        if not alias or len(targets) != 1:
            raise InvalidParameter(
                f"--promote-if: expected an alias and one of --registry and --server, got {alias or 'no alias'} and "
                f"{len(targets)} places",
                got=len(targets),
            )
        rule = Rule(metric, margin or 0.0)
        metrics_of(preset_of(PRESET), [METRIC_OF[metric]])
        if data is not None:
            read_dataset(data)
        return cls(rule, data)

    def publish(
        self,
        request: RunRequest,
        result: RunResult,
        record: Mapping[str, Any],
        targets: Targets,
        ref: TaskRef,
        threads: int | None,
        console: Console,
    ) -> Mapping[str, Any]:
        """Judge and publish; where the alias has moved meanwhile judge once more. Return the outcome.

        It is also in ``gate.json`` in the result folder.
        """
        assert ref.alias is not None, "checked: there is one to move"
        backbone = load_backbone(
            request.backbone, dtype=getattr(torch, request.dtype), device=request.device,
            ignore_generation_config=request.ignore_generation_config,
        )  # fmt: skip
        gate = gate_of(request, result.artifact, self.rule, PRESET, self.data)
        outcome: Mapping[str, Any] = {}
        for moves in range(MOST_MOVES + 1):
            if moves < MOST_MOVES:
                current = targets.current(ref)
                console.print("scoring the new version and the current one")
                made = gate.judge(backbone, read_prefix(current) if current is not None else None, threads=threads)
                outcome = made.as_dict()
            outcome = after_moves(outcome, moves)
            write_json(request.output / "gate.json", outcome)
            try:
                targets.publish(ref, result.artifact, {**record, "gate": outcome}, ref.alias)
                break
            except AliasMoved:
                continue
        console.print(f"gate: {outcome['verdict']}: {outcome['reason']}", markup=False)
        return outcome
