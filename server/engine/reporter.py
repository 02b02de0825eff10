"""What a request's end looks like: outputs, usage, timing; and the observer's share of it. Torch-free.

Owns the clock readings of a request and the form of its terminal events; the engine decides when they happen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from prefixes.errors import PrefixdError
from server.engine.observer import EngineObserver
from server.engine.row import Group, Sequence
from server.engine.types import Failed, Finished, FinishReason, Output, Timing, Usage


class Reporter:
    """Notes when things happen and writes the terminal events."""

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int], observer: EngineObserver) -> None:
        self._tokenizer, self._eos, self._observer = tokenizer, eos_token_ids, observer

    def admitted(self, groups: Iterable[Group]) -> None:
        """These groups run in this step; for some it is the first."""
        now = time.monotonic()
        for group in groups:
            if group.admitted_at is None:
                group.admitted_at = now

    def token(self, group: Group, sequence: Sequence) -> None:
        """A token was chosen for ``sequence``."""
        now = time.monotonic()
        if group.first_token_at is None:
            group.first_token_at = now
            self._observer.on_first_token(group.request.task, now - group.submitted_at)
        elif sequence.last_token_at:
            self._observer.on_inter_token(group.request.task, now - sequence.last_token_at)
        sequence.last_token_at = now

    def finished(self, group: Group, reason: FinishReason | None = None) -> Finished:
        """The terminal event of a group that ran; ``reason`` where it is not its first output's own."""
        outputs = self._outputs(group)
        usage = self._usage(group, sum(len(output.token_ids) for output in outputs))
        now, first = time.monotonic(), group.first_token_at
        ended = reason or outputs[0].finish_reason
        self._observer.on_finish(group.request.task, ended, usage, now - group.submitted_at)
        timing = Timing(
            queue_ms=1e3 * ((group.admitted_at or now) - group.submitted_at),
            time_to_first_token_ms=None if first is None else 1e3 * (first - group.submitted_at),
            total_ms=1e3 * (now - group.submitted_at),
        )
        return Finished(group.request.request_id, outputs, usage, timing)

    def failed(self, group: Group, error: PrefixdError) -> Failed:
        """The terminal event of a group that could not run on."""
        usage = self._usage(group, sum(len(group.generated(row)) for row in group.sequences))
        self._observer.on_finish(group.request.task, None, usage, time.monotonic() - group.submitted_at)
        return Failed(group.request.request_id, error)

    def _outputs(self, group: Group) -> tuple[Output, ...]:
        if group.beams and group.beams.done:
            return tuple(
                Output(self._text(best.token_ids), best.token_ids, best.finish_reason, score=float(best.score))
                for best in group.beams.best()
            )
        outputs = []
        for row in group.sequences[: group.request.params.num_return_sequences]:
            tokens = tuple(group.generated(row))
            text = row.detokenizer.text if row.detokenizer else self._text(tokens)
            logprobs = tuple(row.logprobs) if group.request.params.logprobs is not None else None
            outputs.append(Output(text, tokens, row.finish_reason or FinishReason.ABORT, logprobs=logprobs))
        return tuple(outputs)

    def _text(self, token_ids: tuple[int, ...]) -> str:
        kept = [token for token in token_ids if token not in self._eos]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=True)
        return text

    def _usage(self, group: Group, output_tokens: int) -> Usage:
        spec = group.request.prefix_spec
        prefix_tokens = sum(site.length for site in spec.sites.values()) if spec else 0
        return Usage(len(group.request.token_ids), prefix_tokens, output_tokens)
