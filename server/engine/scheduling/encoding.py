"""Chooses which inputs go through the encoder in a step, and through how many layers, by a budget of time. Torch-free.

An encoder sees all of an input at once, so its work is cut by layers, not by tokens. Some inputs go through it together
and finish before the next ones begin. A group that leaves them (preempted, aborted) does not hold up the rest.

Owns this choice. What a unit of work costs, ``rate`` says. Knows no blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.engine.config import EngineConfig
from server.engine.row import EncodedInput, Group
from server.engine.scheduling.rate import CROSS_WEIGHTS, Rate, attended_work, first_guess


@dataclass(frozen=True)
class EncoderWork:
    """One encoder call: ``units`` of the model's work over the whole inputs of ``groups``."""

    groups: tuple[Group, ...]
    inputs: tuple[EncodedInput, ...]  # of the groups, in order
    units: range

    @property
    def tokens(self) -> int:
        return sum(len(encoded.token_ids) for encoded in self.inputs)


class EncoderBudget:
    """Chooses each step's encoder work to stay within the budget, by what earlier calls took.

    The budget holds whether rows run or not: it also bounds how long a newcomer waits for its first step. An encoder
    layer costs several times as much as the cross-attention keys and values of a decoder layer. So each kind
    has its own rate, and no call mixes them.
    """

    def __init__(self, layers: int, units: int, hidden_size: int, config: EngineConfig) -> None:
        """All ``units`` of the encoder; the first ``layers`` of them are its own layers. Both 0 without an encoder."""
        self.units = units
        self._layers, self._hidden = layers, hidden_size
        self._budget, self._most_tokens = config.max_step_ms / 1e3, config.max_encoder_tokens
        self._layer_rate = Rate(first_guess(hidden_size), fixed=config.deterministic)
        self._cross_rate = Rate(first_guess(hidden_size, CROSS_WEIGHTS), fixed=config.deterministic)

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
        end = self._layers if done < self._layers else self.units
        count = max(1.0, min(self._rate(done).within(self._budget) / self._work(inputs, done), end - done))
        return EncoderWork(groups, inputs, range(done, done + int(count)))

    def seconds(self, work: EncoderWork | None) -> float:
        """What ``work`` is expected to take."""
        if work is None:
            return 0.0
        done = work.units.start
        return self._rate(done).seconds(self._work(work.inputs, done) * len(work.units))

    def ran(self, work: EncoderWork, seconds: float) -> list[Group]:
        """Note that ``work`` took ``seconds``. Returns the groups whose input is now encoded."""
        done = work.units.start
        self._rate(done).add(self._work(work.inputs, done) * len(work.units), seconds)
        for encoded in work.inputs:
            encoded.done = work.units.stop
        return [group for group in work.groups if not group.encoding]

    def _fits(self, inputs: Sequence[EncodedInput]) -> bool:
        """Whether one layer over these inputs stays within the budget."""
        if sum(len(encoded.token_ids) for encoded in inputs) > self._most_tokens:
            return False
        return self._layer_rate.within(self._budget) >= self._work(inputs, 0)

    def _rate(self, unit: int) -> Rate:
        return self._layer_rate if unit < self._layers else self._cross_rate

    def _work(self, inputs: Sequence[EncodedInput], unit: int) -> float:
        """The cost of unit number ``unit`` over the inputs, in tokens. A layer's attention is quadratic in length."""
        lengths = [len(encoded.token_ids) for encoded in inputs]
        if unit >= self._layers:
            return float(sum(lengths))
        return sum(attended_work(length, 0, self._hidden, causal=False) for length in lengths)
