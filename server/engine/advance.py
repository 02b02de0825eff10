"""What a step's logits do to the rows: tokens chosen, beams moved on, outputs ended.

Owns the way from logits to events for rows that ran; knows neither admission nor blocks beyond what it tells the
scheduler. The engine decides what finishing and failing a group means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from prefixes.errors import EngineFailure, PrefixdError
from server.engine.processors import changes_scores, processed
from server.engine.reporter import Reporter
from server.engine.sampler import Choice, Chosen, Sampler
from server.engine.scheduler import ScheduledRow, Scheduler
from server.engine.sequence import Group, GroupState, Sequence
from server.engine.token_rules import TokenRules
from server.engine.types import Event, Failed, Finished, FinishReason, TokenEvent

log = logging.getLogger(__name__)


def unexpected(error: Exception) -> EngineFailure:
    """What a user may see of an unexpected error: its kind, not its text (which may quote the request)."""
    return EngineFailure(f"the engine failed with {type(error).__name__}")


class Advance:
    """Takes in the logits of one step after the other."""

    def __init__(
        self,
        scheduler: Scheduler,
        reporter: Reporter,
        rules: TokenRules,
        *,
        finish: Callable[[Group], Finished],
        fail: Callable[[Group, PrefixdError], Failed],
    ) -> None:
        self._scheduler, self._reporter, self._rules = scheduler, reporter, rules
        self._sampler = Sampler(rules.eos)
        self._finish, self._fail = finish, fail

    def __call__(self, rows: list[ScheduledRow], logits: torch.Tensor, events: list[Event]) -> None:
        """``logits (n, vocab)``: one for each row that wants them, in the rows' order. Adds to ``events``."""
        choices: list[Choice] = []
        chosen_by: list[tuple[Group, Sequence]] = []
        beams: dict[int, tuple[Group, list[int]]] = {}
        index = 0
        for row in rows:
            group = row.group
            self._scheduler.computed(row)
            if not row.wants_logits:
                if group.started and len(group.active) > 1 and row.start + row.count == group.prompt_length:
                    self._scheduler.fork_prompt(group)  # recomputed after preemption
                continue
            if group.beams:
                beams.setdefault(id(group), (group, []))[1].append(index)
            else:
                drawing = [row.sequence] if group.started else group.sequences
                if len(drawing) > 1:
                    self._scheduler.fork_prompt(group)
                for sequence in drawing:
                    choices.append(self._choice(group, sequence, index))
                    chosen_by.append((group, sequence))
            index += 1
        if choices:
            for (group, sequence), chosen in zip(chosen_by, self._sampler.choose(logits, choices), strict=True):
                self._guard(group, events, self._take_token, sequence, chosen)
        for group, indices in beams.values():
            self._guard(group, events, self._choose_beams, logits[indices])

    def _choice(self, group: Group, sequence: Sequence, index: int) -> Choice:
        tokens, params = sequence.token_ids, group.request.params
        generated = len(tokens) - group.prompt_length
        forced = self._rules.forced(group.prompt_length, generated, group.max_new_tokens)
        return Choice(index, params, tokens, generated, group.seed, sequence.index, forced)

    def _guard(self, group: Group, events: list[Event], act: Callable[..., list[Event]], *arguments: object) -> None:
        """One bad row never harms its neighbours: what ``act`` raises ends this group alone."""
        if group.state is GroupState.ENDED:
            return  # by an earlier row of the group
        try:
            events += act(group, *arguments)
        except PrefixdError as error:
            events.append(self._fail(group, error))
        except Exception as error:
            log.exception("a row failed; its request ends with an error")
            events.append(self._fail(group, unexpected(error)))

    def _take_token(self, group: Group, sequence: Sequence, chosen: Chosen) -> list[Event]:
        if chosen.token_id is None:
            raise EngineFailure("the model's output for this row is not finite")
        assert sequence.detokenizer is not None
        token = chosen.token_id
        sequence.token_ids.append(token)
        if chosen.logprob:
            sequence.logprobs.append(chosen.logprob)
        self._reporter.token(group, sequence)
        ended = token in self._rules.eos
        stopped = not ended and sequence.detokenizer.push(token)
        generated = len(sequence.token_ids) - group.prompt_length
        if ended or stopped or generated >= group.max_new_tokens:
            stopped = stopped or sequence.detokenizer.finish()
            natural = ended and not self._rules.cut_short(generated, group.max_new_tokens)
            sequence.finish_reason = FinishReason.STOP if natural or stopped else FinishReason.LENGTH
            self._scheduler.finish_row(sequence)
        text = sequence.detokenizer.take(final=not sequence.active)
        logprobs = (chosen.logprob,) if chosen.logprob else None
        event = TokenEvent(group.request.request_id, sequence.index, text, (token,), logprobs)
        return [event] if group.active else [event, self._finish(group)]

    def _choose_beams(self, group: Group, logits: torch.Tensor) -> list[Event]:
        assert group.beams is not None
        if not bool(torch.isfinite(logits.amax(dim=1)).all()):
            raise EngineFailure("the model's output for this row is not finite")
        parents, params = group.sequences, group.request.params
        generated = [group.generated(row) for row in parents]
        scores = torch.log_softmax(logits, dim=1)
        forced = self._rules.forced(group.prompt_length, len(generated[0]), group.max_new_tokens)
        if forced is not None:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, forced] = 0
        elif changes_scores(params, len(generated[0])):
            scores = torch.stack([
                processed(row_scores, row.token_ids, len(generated[0]), params, self._rules.eos)
                for row_scores, row in zip(scores, parents, strict=True)
            ])
        running = group.beams.advance(scores, generated)
        self._reporter.token(group, parents[0])
        if group.beams.done:
            return [self._finish(group)]
        rows = [
            Sequence(i, [*parents[beam.parent].token_ids, beam.token_id], last_token_at=parents[0].last_token_at)
            for i, beam in enumerate(running)
        ]
        self._scheduler.replace_rows(group, rows, [parents[beam.parent] for beam in running])
        return []
