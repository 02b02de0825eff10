"""Chooses which inputs go through the encoder in a step, and through how many layers, by a budget of time. Torch-free.

An encoder sees all of an input at once, so its work is cut by layers, not by tokens. Some inputs go through it together
and finish before the next ones begin. A group that leaves them (preempted, aborted) does not hold up the rest.

Owns this choice, and the measured cost per token of a unit of work. Knows no blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.engine.config import EngineConfig
from server.engine.row import EncodedInput, Group

SETTLED = 1024  # token-units of work: a call of this size counts as much as all calls measured before it
SHORTEST = 1e-9  # seconds that a call takes at least: a coarse clock may show none
# In an input of so many times the hidden size, attention takes half of a layer's time. Measured for BART base on a busy
# CPU: attention takes 11 % of the linear layers' time at 256 tokens, 51 % at 1,024.
ATTENTION_WIDTHS = 3


@dataclass(frozen=True)
class EncoderWork:
    """One encoder call: ``units`` of the model's work over the whole inputs of ``groups``."""

    groups: tuple[Group, ...]
    inputs: tuple[EncodedInput, ...]  # of the groups, in order
    units: range

    @property
    def tokens(self) -> int:
        return sum(len(encoded.token_ids) for encoded in self.inputs)


class _Rate:
    """Measured seconds per token and unit of one kind; unknown before the first call."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def add(self, work: float, seconds: float) -> None:
        weight = 1.0 if self.seconds is None else work / (work + SETTLED)
        self.seconds = (1 - weight) * (self.seconds or 0.0) + weight * max(seconds, SHORTEST) / work

    def within(self, budget: float, work: float) -> float:
        """How many times ``work`` fits into ``budget`` seconds; 0 while that is unknown."""
        return 0.0 if self.seconds is None else budget / (work * self.seconds)


class EncoderBudget:
    """Chooses each step's encoder work to stay within the budget, by what earlier calls took.

    An encoder layer costs several times as much as the cross-attention keys and values of a decoder layer. So each kind
    has its own rate, and no call mixes them.
    """

    def __init__(self, layers: int, units: int, hidden_size: int, config: EngineConfig) -> None:
        """All ``units`` of the encoder; the first ``layers`` of them are its own layers. Both 0 without an encoder."""
        self.units = units
        self._layers, self._hidden = layers, hidden_size
        self._budget, self._most_tokens = config.encoder_step_ms / 1e3, config.max_encoder_tokens
        self._layer_rate, self._cross_rate = _Rate(), _Rate()

    def choose(self, running: Iterable[Group]) -> EncoderWork | None:
        """The next call for the ``running`` groups, which are in order of arrival; None if no input waits."""
        waiting = [(group, group.input) for group in running if group.input is not None and not group.input.complete]
        if not waiting:
            return None
        done = max(encoded.done for _, encoded in waiting)
        together: list[tuple[Group, EncodedInput]] = []
        for group, encoded in waiting:
            if encoded.done == done and (done or not together or self._fits([*(e for _, e in together), encoded])):
                together.append((group, encoded))
        groups, inputs = zip(*together, strict=True)
        rate, end = (self._layer_rate, self._layers) if done < self._layers else (self._cross_rate, self.units)
        count = max(1.0, min(rate.within(self._budget, self._work(inputs, done)), end - done))
        return EncoderWork(groups, inputs, range(done, done + int(count)))

    def ran(self, work: EncoderWork, seconds: float) -> list[Group]:
        """Note that ``work`` took ``seconds``. Returns the groups whose input is now encoded."""
        rate = self._layer_rate if work.units.start < self._layers else self._cross_rate
        rate.add(self._work(work.inputs, work.units.start) * len(work.units), seconds)
        for encoded in work.inputs:
            encoded.done = work.units.stop
        return [group for group in work.groups if not group.encoding]

    def _fits(self, inputs: Sequence[EncodedInput]) -> bool:
        """Whether one layer over these inputs stays within the budget, as far as that is known."""
        if sum(len(encoded.token_ids) for encoded in inputs) > self._most_tokens:
            return False
        rate = self._layer_rate
        return rate.seconds is None or rate.within(self._budget, self._work(inputs, 0)) >= 1

    def _work(self, inputs: Sequence[EncodedInput], unit: int) -> float:
        """The cost of unit number ``unit`` over the inputs, in tokens. A layer's attention is quadratic in length."""
        lengths = [len(encoded.token_ids) for encoded in inputs]
        if unit >= self._layers:
            return float(sum(lengths))
        return sum(length * (1 + length / (ATTENTION_WIDTHS * self._hidden)) for length in lengths)
