"""Which inputs go through the encoder in a step, and how far: groups of layers within a budget of time. Torch-free.

An encoder sees all of an input at once, so that its work is cut by layers, not by tokens. One cohort of inputs is under
way at a time and is finished before the next one begins; groups that leave it (preempted, aborted) do not hold it up.

Owns the pace (what a unit of work costs per token, measured while it runs) and the choice; knows no blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.config import EngineConfig
from server.engine.sequence import EncodedInput, Group

SETTLED = 1024  # units of work over a token: a call of so many counts as much as all that were measured before it


@dataclass(frozen=True)
class EncoderWork:
    """One encoder call: ``units`` of the model's work over the whole inputs of ``groups``."""

    groups: tuple[Group, ...]
    inputs: tuple[EncodedInput, ...]  # of the groups, in order
    units: range

    @property
    def tokens(self) -> int:
        return sum(len(encoded.token_ids) for encoded in self.inputs)


class EncoderPace:
    """Chooses each step's encoder work so that it keeps to the budget, by what the work has cost so far."""

    def __init__(self, units: int, config: EngineConfig) -> None:
        """``units`` of the model's encoder; 0 where there is none."""
        self.units = units
        self._budget, self._most_tokens = config.encoder_step_ms / 1e3, config.max_encoder_tokens
        self._seconds: float | None = None  # for one unit over one token; unknown before the first call

    def choose(self, running: Iterable[Group]) -> EncoderWork | None:
        """The next call for the groups that run, in order of arrival; None if no input waits."""
        waiting = [(group, group.input) for group in running if group.input is not None and group.encoding]
        if not waiting:
            return None
        done = max(encoded.done for _, encoded in waiting)
        cohort: list[tuple[Group, EncodedInput]] = []
        tokens = 0
        for group, encoded in waiting:
            count = len(encoded.token_ids)
            if encoded.done == done and (done or not cohort or self._fits(tokens + count)):
                cohort.append((group, encoded))
                tokens += count
        groups, inputs = zip(*cohort, strict=True)
        return EncoderWork(groups, inputs, range(done, min(self.units, done + self._units_for(tokens))))

    def took(self, work: EncoderWork, seconds: float) -> None:
        """``work`` has run, in ``seconds``."""
        done = work.tokens * len(work.units)
        weight = 1.0 if self._seconds is None else done / (done + SETTLED)
        self._seconds = (1 - weight) * (self._seconds or 0.0) + weight * seconds / done

    def _fits(self, tokens: int) -> bool:
        """Whether one unit over so many tokens keeps to the budget."""
        return tokens <= self._most_tokens and (self._seconds is None or tokens * self._seconds <= self._budget)

    def _units_for(self, tokens: int) -> int:
        return 1 if self._seconds is None else max(1, int(self._budget / (tokens * self._seconds)))
