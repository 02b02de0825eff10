"""What a step's logits do to the rows: tokens chosen, beams moved on, outputs ended.

Owns the way from logits to events for rows that ran; knows neither admission nor blocks beyond what it tells the
scheduler. The engine decides what finishing and failing a group means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from prefixes.errors import EngineFailure, PrefixdError
from server.engine.decoding.processors import changes_scores, processed
from server.engine.decoding.sampler import Choice, Chosen, Sampler
from server.engine.decoding.token_rules import TokenRules
from server.engine.reporter import Reporter
from server.engine.row import Group, GroupState, Sequence
from server.engine.scheduling.scheduler import ScheduledRow, Scheduler
from server.engine.types import Event, Failed, Finished, FinishReason, TokenEvent

log = logging.getLogger(__name__)


def unexpected(error: Exception) -> EngineFailure:
    """What a user may see of an unexpected error: its kind, not its text (which may quote the request)."""
    return EngineFailure(f"the engine failed with {type(error).__name__}")


def _check_finite(greatest: torch.Tensor) -> None:
    """``greatest`` of each row, NaN where the row has any."""
    if not bool(torch.isfinite(greatest).all()):
        raise EngineFailure("the model's output for this row is not finite")


class Advance:
    """Takes in the logits of one step after the other."""

    def __init__(
        self,
        scheduler: Scheduler,
        reporter: Reporter,
        rules: TokenRules,
        top_log_probs: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
        *,
        finish: Callable[[Group], Finished],
        fail: Callable[[Group, PrefixdError], Failed],
    ) -> None:
        self._scheduler, self._reporter, self._rules = scheduler, reporter, rules
        self._sampler, self._top = Sampler(rules.eos), top_log_probs
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
        self._advance_beams(list(beams.values()), logits, events)

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
            facts = {"request_id": group.request.request_id}
            log.exception("a row failed; its request ends with an error", extra={"facts": facts})
            events.append(self._fail(group, unexpected(error)))

    def _processed_scores(self, group: Group, logits: torch.Tensor, generated: list[list[int]]) -> torch.Tensor:
        """Log-probabilities ``(rows, vocab)`` after penalties, bans and forced tokens."""
        params, rows = group.request.params, group.sequences
        forced = self._rules.forced(group.prompt_length, len(generated[0]), group.max_new_tokens)
        if forced is not None:
            scores = torch.full_like(logits, -torch.inf)
            scores[:, forced] = 0
            return scores
        return torch.stack([
            processed(row_scores, row.token_ids, len(generated[0]), params, self._rules.eos)
            for row_scores, row in zip(torch.log_softmax(logits, dim=1), rows, strict=True)
        ])

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

    def _advance_beams(self, groups: list[tuple[Group, list[int]]], logits: torch.Tensor, events: list[Event]) -> None:
        """Groups whose scores nothing changes need only each row's best tokens, which are found for all at once."""
        plain = [entry for entry in groups if not self._changes(entry[0])]
        best: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if plain:
            rows = [index for _, indices in plain for index in indices]
            chosen = logits if len(rows) == logits.shape[0] else logits[rows]
            most = max(group.beams.candidates for group, _ in plain if group.beams)
            values, ids = self._top(chosen, min(most, logits.shape[1]))
            begin = 0
            for group, indices in plain:
                part = slice(begin, begin + len(indices))
                best[id(group)] = (values[part], ids[part])
                begin += len(indices)
        for group, indices in groups:
            self._guard(group, events, self._choose_beams, logits, indices, best.get(id(group)))

    def _changes(self, group: Group) -> bool:
        """Whether anything but the model decides the group's next tokens."""
        generated = len(group.sequences[0].token_ids) - group.prompt_length
        forced = self._rules.forced(group.prompt_length, generated, group.max_new_tokens)
        return forced is not None or changes_scores(group.request.params, generated)

    def _choose_beams(
        self, group: Group, logits: torch.Tensor, indices: list[int], best: tuple[torch.Tensor, torch.Tensor] | None
    ) -> list[Event]:
        assert group.beams is not None
        parents = group.sequences
        generated = [group.generated(row) for row in parents]
        if best is None:
            own = logits[indices]
            _check_finite(own.amax(dim=1))
            running = group.beams.advance(self._processed_scores(group, own, generated), generated)
        else:
            values, ids = (part[:, : group.beams.candidates] for part in best)
            _check_finite(values[:, 0])
            running = group.beams.choose(values, ids, generated)
        self._reporter.token(group, parents[0])
        if group.beams.done:
            return [self._finish(group)]
        rows = [
            Sequence(i, [*parents[beam.parent].token_ids, beam.token_id], last_token_at=parents[0].last_token_at)
            for i, beam in enumerate(running)
        ]
        self._scheduler.replace_rows(group, rows, [parents[beam.parent] for beam in running])
        return []
