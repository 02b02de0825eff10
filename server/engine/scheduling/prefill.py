"""Cuts a step's prompts into chunks, so that rows that run do not wait for them longer than the budget. Torch-free.

Owns the share of a step's tokens and time that prompts get, and the measured cost of a decoder's token. Knows no
blocks. The encoder's inputs take theirs first (``encoding``): both share one budget, ``max_step_ms``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from server.engine.config import EngineConfig
from server.engine.scheduling.plan import ScheduledRow
from server.engine.scheduling.rate import Rate, attended_work, first_guess, tokens_within

SETTLED_CALLS = 8.0  # calls without a prompt that count as much as one more


class PrefillBudget:
    """Chooses each step's chunks, by what earlier calls of the decoder took."""

    def __init__(self, layers: int, hidden_size: int, config: EngineConfig) -> None:
        self._layers, self._hidden = layers, hidden_size
        self._budget, self._most_tokens = config.max_step_ms / 1e3, config.max_step_tokens
        self._least_tokens = config.block_size
        self._rate = Rate(first_guess(hidden_size), fixed=config.deterministic)
        self._decode_call = Rate(0.0, settled=SETTLED_CALLS)  # seconds of a call without a prompt

    def chunks(
        self, decode: Sequence[ScheduledRow], prefill: Sequence[ScheduledRow], encoder_seconds: float
    ) -> list[ScheduledRow]:
        """What ``prefill`` rows, all that is left of each, compute beside ``decode`` rows and the encoder.

        The first of them gets a block at least. Where no row has begun to answer, time is no limit.
        """
        held_up = any(scheduled.group.started for scheduled in decode)
        seconds = self._budget - encoder_seconds if held_up else math.inf
        tokens, chosen = self._most_tokens - len(decode), list[ScheduledRow]()
        for scheduled in prefill:
            count = min(scheduled.count, tokens, self._fitting(scheduled, seconds, least=not chosen))
            if count > 0:
                chosen.append(replace(scheduled, count=count))
                tokens -= count
                seconds -= self._rate.seconds(self._work(chosen[-1]))
        return chosen

    def ran(self, rows: Sequence[ScheduledRow], seconds: float) -> None:
        """Note that a call over ``rows`` took ``seconds``.

        Prompts took what is above a call without any. As that is noisy: a quarter of their share by tokens at least.
        """
        prompts = [scheduled for scheduled in rows if scheduled.count > 1]
        if not prompts:
            self._decode_call.add(1, seconds)
            return
        if len(prompts) < len(rows):
            tokens = sum(scheduled.count for scheduled in prompts)
            share = tokens / (tokens + len(rows) - len(prompts))
            seconds = max(seconds - self._decode_call.seconds(1), seconds * share / 4)
        self._rate.add(sum(self._work(scheduled) for scheduled in prompts), seconds)

    def _fitting(self, scheduled: ScheduledRow, seconds: float, *, least: bool) -> int:
        if seconds == math.inf:
            return scheduled.count
        work = self._rate.within(max(0.0, seconds)) / self._layers
        return max(tokens_within(work, _keys(scheduled), self._hidden), self._least_tokens * least)

    def _work(self, scheduled: ScheduledRow) -> float:
        return self._layers * attended_work(scheduled.count, _keys(scheduled), self._hidden, causal=True)


def _keys(scheduled: ScheduledRow) -> int:
    """Keys that the row's first token of this step finds."""
    return scheduled.group.prefix_length("decoder") + scheduled.start
