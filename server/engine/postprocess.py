"""Turns a step's logits into outcomes, one a group: tokens chosen, beams moved on, outputs ended.

Changes nothing but decoding states and beams. Knows neither blocks nor queues: the engine gives the outcomes to the
scheduler and to the clients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from prefixes.errors import EngineFailure, PrefixdError
from server.engine.decoding.processors import changes_scores, processed
from server.engine.decoding.sampler import Choice, Sampler, best_tokens
from server.engine.decoding.token_rules import TokenRules, no_token_left
from server.engine.row import Group, Row
from server.engine.runner import StepResult
from server.engine.scheduling.plan import Outcome, ScheduledRow, StepPlan
from server.engine.types import FinishReason, TokenEvent

log = logging.getLogger(__name__)

TopLogProbs = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _GroupLogits:
    """The rows of one group that choose in this step, and the indices of their logits."""

    outcome: Outcome
    rows: list[Row] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    @property
    def group(self) -> Group:
        return self.outcome.group


class Postprocess:
    """Turns the result of each step into outcomes."""

    def __init__(self, rules: TokenRules, top_log_probs: TopLogProbs) -> None:
        self._rules, self._top = rules, top_log_probs
        self._sampler = Sampler(rules.eos)

    def __call__(self, plan: StepPlan, result: StepResult) -> list[Outcome]:
        """One outcome for each group that could not run, that failed or that chose."""
        outcomes = [Outcome(group, error=error) for group, error in plan.failed]
        if plan.encode and result.encoder_error:
            outcomes += _failures(plan.encode.groups, result.encoder_error)
        if result.decoder_error is None:
            try:
                return outcomes + self._choose(plan.rows, result.logits)
            except Exception as error:
                log.exception("choosing tokens failed; %d rows end with an error", len(plan.rows), extra=_facts(plan))
                result.decoder_error = error
        return outcomes + _failures((row.group for row in plan.rows), result.decoder_error)

    def abort(self, group: Group) -> Outcome:
        """End a group now, with what it has."""
        outcome = Outcome(group, reason=FinishReason.ABORT)
        for row in group.active:
            _guarded(outcome, self._abort_row, row)
        outcome.finished = outcome.error is None
        return outcome

    def _abort_row(self, outcome: Outcome, row: Row) -> None:
        row.decoding.finish_reason = FinishReason.ABORT
        if detokenizer := row.decoding.detokenizer:
            detokenizer.finish()
            text = detokenizer.take(final=True)  # what was held back belongs to the final text
            if text:
                outcome.events.append(TokenEvent(outcome.group.request.request_id, row.decoding.index, text, ()))

    def _choose(self, rows: Sequence[ScheduledRow], logits: torch.Tensor) -> list[Outcome]:
        """Choose from ``logits (n, vocab)``: one line for each row that wants them, in the rows' order."""
        wanting: dict[Group, _GroupLogits] = {}
        for index, scheduled in enumerate(row for row in rows if row.wants_logits):
            group = scheduled.group
            entry = wanting.setdefault(group, _GroupLogits(Outcome(group)))
            drawing = [scheduled.row] if group.started or group.beams else group.rows  # all draw from the prompt
            entry.rows += drawing
            entry.indices += [index] * len(drawing)
        self._draw([entry for entry in wanting.values() if not entry.group.beams], logits)
        self._move_beams([entry for entry in wanting.values() if entry.group.beams], logits)
        return [entry.outcome for entry in wanting.values()]

    # --- rows that draw their own tokens ---

    def _draw(self, entries: Sequence[_GroupLogits], logits: torch.Tensor) -> None:
        greedy = best_tokens(logits) if entries else []
        for entry in entries:
            for row, index in zip(entry.rows, entry.indices, strict=True):
                _guarded(entry.outcome, self._take_token, row, logits[index], greedy[index])

    def _choice(self, group: Group, row: Row) -> Choice:
        state, forced, banned = row.decoding, self._forced(group, row), self._banned(group, row)
        return Choice(
            group.request.params, state.token_ids, state.output_length, group.seed, state.index, forced, banned
        )

    def _forced(self, group: Group, row: Row) -> int | None:
        """The token that the row must take next, if the backbone says so."""
        return self._rules.forced(group.prompt_length, row.decoding.output_length, group.max_new_tokens)

    def _banned(self, group: Group, row: Row) -> frozenset[int]:
        """The tokens that the backbone suppresses where the row is."""
        return self._rules.banned(group.prompt_length, row.decoding.output_length)

    def _take_token(self, outcome: Outcome, row: Row, logits: torch.Tensor, greedy: int | None) -> None:
        if greedy is None:
            raise EngineFailure("the model's output for this row is not finite")
        group, state = outcome.group, row.decoding
        assert state.detokenizer is not None
        chosen = self._sampler.choose(logits, self._choice(group, row), greedy)
        token = chosen.token_id
        state.token_ids.append(token)
        if chosen.logprob:
            state.logprobs.append(chosen.logprob)
        outcome.advanced.append(state.index)
        ended = token in self._rules.eos
        stopped = not ended and state.detokenizer.push(token)
        if ended or stopped or state.output_length >= group.max_new_tokens:
            stopped = stopped or state.detokenizer.finish()
            natural = ended and not self._rules.cut_short(state.output_length, group.max_new_tokens)
            state.finish_reason = FinishReason.STOP if natural or stopped else FinishReason.LENGTH
            outcome.ended.append(row)
        text = state.detokenizer.take(final=not state.active)
        logprobs = (chosen.logprob,) if chosen.logprob else None
        outcome.events.append(TokenEvent(group.request.request_id, state.index, text, (token,), logprobs))
        outcome.finished = not group.active

    # --- beams ---

    def _move_beams(self, entries: Sequence[_GroupLogits], logits: torch.Tensor) -> None:
        """Groups whose scores nothing changes need only each row's best tokens: these are found for all at once."""
        plain = [entry for entry in entries if not self._changes_scores(entry.group)]
        best: dict[Group, tuple[torch.Tensor, torch.Tensor]] = {}
        if plain:
            indices = [index for entry in plain for index in entry.indices]
            chosen = logits if len(indices) == logits.shape[0] else logits[indices]
            most = max(entry.group.beams.candidates for entry in plain if entry.group.beams)
            values, ids = self._top(chosen, min(most, logits.shape[1]))
            sizes = [len(entry.indices) for entry in plain]
            for entry, *parts in zip(plain, values.split(sizes), ids.split(sizes), strict=True):
                best[entry.group] = (parts[0], parts[1])
        for entry in entries:
            _guarded(entry.outcome, self._choose_beams, logits, entry.indices, best.get(entry.group))

    def _changes_scores(self, group: Group) -> bool:
        """Whether anything but the model decides the group's next tokens."""
        first = group.rows[0]
        banned = self._banned(group, first)
        changes = changes_scores(group.request.params, first.decoding.output_length, banned)
        return changes or self._forced(group, first) is not None

    def _choose_beams(
        self, outcome: Outcome, logits: torch.Tensor, indices: list[int], best: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        group, parents = outcome.group, outcome.group.rows
        assert group.beams is not None
        generated = [row.decoding.output_ids for row in parents]
        if best is None:
            own = logits[indices]
            _check_finite(own.amax(dim=1))
            running = group.beams.advance(self._processed_scores(group, own), generated)
        else:
            values, ids = (part[:, : group.beams.candidates] for part in best)
            _check_finite(values[:, 0])
            running = group.beams.choose(values, ids, generated)
        outcome.advanced.append(0)
        outcome.finished = group.beams.done
        beams = [(Row(parents[beam.parent].decoding.fork(index)), beam) for index, beam in enumerate(running)]
        for row, beam in beams:
            row.token_ids.append(beam.token_id)
        outcome.beams = [(row, parents[beam.parent]) for row, beam in beams]

    def _processed_scores(self, group: Group, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``(rows, vocab)`` after penalties, bans and forced tokens."""
        params, generated = group.request.params, group.rows[0].decoding.output_length
        forced, banned = self._forced(group, group.rows[0]), self._banned(group, group.rows[0])
        if forced is not None:
            if forced in banned:
                raise no_token_left()
            scores = torch.full_like(logits, -torch.inf)
            scores[:, forced] = 0
            return scores
        return torch.stack([
            processed(row_scores, row.token_ids, generated, params, self._rules.eos, banned)
            for row_scores, row in zip(torch.log_softmax(logits, dim=1), group.rows, strict=True)
        ])


def _guarded(outcome: Outcome, act: Callable[..., None], *arguments: object) -> None:
    """One bad row never harms its neighbours: an error in ``act`` ends this group alone."""
    if outcome.ends_group:
        return  # an earlier row of the group ended it
    try:
        act(outcome, *arguments)
    except PrefixdError as error:
        outcome.error = error
    except Exception as error:
        facts = {"request_id": outcome.group.request.request_id}
        log.exception("a row failed; its request ends with an error", extra={"facts": facts})
        outcome.error = EngineFailure.unexpected(error)


def _failures(groups: Iterable[Group], error: Exception) -> list[Outcome]:
    return [Outcome(group, error=EngineFailure.unexpected(error)) for group in dict.fromkeys(groups)]


def _facts(plan: StepPlan) -> dict[str, object]:
    return {"facts": {"request_ids": list(dict.fromkeys(row.group.request.request_id for row in plan.rows))}}


def _check_finite(greatest: torch.Tensor) -> None:
    """Raise EngineFailure unless ``greatest`` is finite. It is the greatest of each row, NaN if the row has any."""
    if not bool(torch.isfinite(greatest).all()):
        raise EngineFailure("the model's output for this row is not finite")
