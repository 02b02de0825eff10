"""Tells clients and the observer about a request: events, usage, timing. Torch-free.

Owns the clock readings of a request and the form of its terminal event. An ``Outcome`` tells it what happened.
"""

from __future__ import annotations

import time
from typing import Any

from prefixes.errors import PrefixdError
from server.engine.decoding.text_stream import text_of
from server.engine.observer import EngineObserver
from server.engine.row import Group
from server.engine.scheduling.plan import Outcome, StepPlan
from server.engine.types import Event, Failed, Finished, FinishReason, Output, Timing, Usage


class Reporter:
    """Notes when things happen and writes the events."""

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int], observer: EngineObserver) -> None:
        self._tokenizer, self._eos, self._observer = tokenizer, eos_token_ids, observer

    def admitted(self, plan: StepPlan) -> None:
        """Note the time for groups that run for the first time."""
        now = time.monotonic()
        for group in plan.groups:
            if group.admitted_at is None:
                group.admitted_at = now

    def stepped(self, plan: StepPlan, calls: dict[str, int], seconds: float) -> None:
        """Report a step that has run; ``calls`` counts model calls by stage."""
        groups = plan.groups
        if groups:
            tasks = len({group.request.prefix for group in groups})
            tokens = sum(row.count for row in plan.rows) + (plan.encode.tokens if plan.encode else 0)
            self._observer.on_step(len(groups), tasks, tokens, seconds, calls)

    def events(self, outcome: Outcome) -> list[Event]:
        """The events of ``outcome``; the last one is terminal if the group ends."""
        group, events = outcome.group, list[Event](outcome.events)
        for index in outcome.advanced:
            self._note_token(group, index)
        if outcome.error is not None:
            events.append(self._failed(group, outcome.error))
        elif outcome.finished:
            events.append(self._finished(group, outcome.reason))
        return events

    def _note_token(self, group: Group, index: int) -> None:
        now = time.monotonic()
        if group.first_token_at is None:
            group.first_token_at = now
            self._observer.on_first_token(group.request.task, now - group.submitted_at)
        elif index in group.last_token_at:
            self._observer.on_inter_token(group.request.task, now - group.last_token_at[index])
        group.last_token_at[index] = now

    def _finished(self, group: Group, reason: FinishReason | None) -> Finished:
        outputs = self._outputs(group)
        usage = self._usage(group, sum(len(output.token_ids) for output in outputs), whole=reason is None)
        now, first = time.monotonic(), group.first_token_at
        ended = reason or outputs[0].finish_reason
        request = group.request
        self._observer.on_finish(request.task, request.caller, ended, usage, now - group.submitted_at)
        timing = Timing(
            queue_ms=1e3 * ((group.admitted_at or now) - group.submitted_at),
            time_to_first_token_ms=None if first is None else 1e3 * (first - group.submitted_at),
            total_ms=1e3 * (now - group.submitted_at),
        )
        return Finished(group.request.request_id, outputs, usage, timing)

    def _failed(self, group: Group, error: PrefixdError) -> Failed:
        rows = group.rows[: group.request.params.num_return_sequences]
        usage = self._usage(group, sum(row.decoding.output_length for row in rows))
        request = group.request
        self._observer.on_finish(request.task, request.caller, None, usage, time.monotonic() - group.submitted_at)
        return Failed(request.request_id, error, None if group.admitted_at is None else usage)

    def _outputs(self, group: Group) -> tuple[Output, ...]:
        if group.beams and group.beams.done:
            return tuple(
                Output(self._text(group, best.token_ids), best.token_ids, best.finish_reason, score=float(best.score))
                for best in group.beams.best()
            )
        outputs = []
        for row in group.rows[: group.request.params.num_return_sequences]:
            state = row.decoding
            tokens = tuple(state.output_ids)
            text = state.detokenizer.text if state.detokenizer else self._text(group, tokens)
            logprobs = tuple(state.logprobs) if group.request.params.logprobs is not None else None
            outputs.append(Output(text, tokens, state.finish_reason or FinishReason.ABORT, logprobs=logprobs))
        return tuple(outputs)

    def _text(self, group: Group, token_ids: tuple[int, ...]) -> str:
        kept = (token for token in token_ids if token not in self._eos)
        return text_of(self._tokenizer, group.prompt.decoder_ids, kept)

    def _usage(self, group: Group, output_tokens: int, *, whole: bool = False) -> Usage:
        """What the group has taken so far; of the input the ``whole``, if it has run to its end."""
        group.note_input()
        spec = group.request.prefix_spec if group.admitted_at is not None else None
        prefix_tokens = sum(site.length for site in spec.sites.values()) if spec else 0
        return Usage(len(group.request.token_ids) if whole else group.input_computed, prefix_tokens, output_tokens)
