"""Which token comes next, at random: what a model and ``Postprocess`` do for the machine of ``scheduling.py``."""

from __future__ import annotations

import random
from dataclasses import dataclass

from server.engine.row import Group, Row
from server.engine.scheduling.plan import Outcome, StepPlan
from server.engine.types import FinishReason


@dataclass
class RandomChoices:
    """A sampled output ends with the probability ``early_end`` after each token, else at its length."""

    rng: random.Random
    early_end: float

    def choose(self, plan: StepPlan) -> list[Outcome]:
        """As ``Postprocess``."""
        wanting: dict[Group, list[Row]] = {}
        for scheduled in plan.rows:
            if scheduled.wants_logits:
                wanting.setdefault(scheduled.group, []).append(scheduled.row)
        outcomes = []
        for group, rows in wanting.items():
            outcomes.append(Outcome(group))
            if group.beams:
                self._advance_beams(outcomes[-1], rows)
            else:
                self._take_tokens(outcomes[-1], rows if group.started else group.rows)
        return outcomes

    def _take_tokens(self, outcome: Outcome, rows: list[Row]) -> None:
        group = outcome.group
        for row in rows:
            outcome.advanced.append(row.decoding.index)
            row.token_ids.append(self.rng.randrange(3))
            ends = group.request.params.do_sample and self.rng.random() < self.early_end
            if ends or row.decoding.output_length >= group.max_new_tokens:
                row.decoding.finish_reason = FinishReason.STOP
                outcome.ended.append(row)
        outcome.finished = not group.active

    def _advance_beams(self, outcome: Outcome, rows: list[Row]) -> None:
        group = outcome.group
        assert rows == group.rows, "beams choose together"
        outcome.advanced.append(0)
        if rows[0].decoding.output_length + 1 >= group.max_new_tokens:
            outcome.finished = True
            return
        parents = sorted(
            self.rng.choices(rows, k=group.request.params.num_beams), key=lambda row: row.decoding.index
        )
        beams = [(Row(parent.decoding.fork(index)), parent) for index, parent in enumerate(parents)]
        for index, (row, _) in enumerate(beams):
            row.token_ids.append(self.rng.randrange(3) + 3 * index)
        outcome.beams = beams
