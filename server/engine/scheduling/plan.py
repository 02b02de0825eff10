"""What passes between the scheduler and the engine: a step's plan, and what the step did to each group. Torch-free.

Owns these data structures and nothing that happens to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prefixes.errors import PrefixdError
from server.engine.row import Group, Row
from server.engine.scheduling.encoding import EncoderWork
from server.engine.types import FinishReason, TokenEvent


@dataclass(frozen=True)
class ScheduledRow:
    """Tokens ``start`` to ``start + count`` of a row are computed in this step."""

    group: Group
    row: Row
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def wants_logits(self) -> bool:
        """Whether the last of its tokens is the row's last, so that the next one can be chosen."""
        return self.end == self.row.length


@dataclass
class StepPlan:
    """One step: inputs to encode, blocks to copy (source, target), then rows to compute; and groups that failed."""

    encode: EncoderWork | None = None
    rows: list[ScheduledRow] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    failed: list[tuple[Group, PrefixdError]] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        """The groups that run, one entry for each input and each row."""
        return [*(self.encode.groups if self.encode else ()), *(scheduled.group for scheduled in self.rows)]


@dataclass
class Outcome:
    """What a step did to one group.

    ``events`` show its new text. ``advanced`` are the outputs that took a token; beams count as one output. ``ended``
    are rows whose output is complete. ``beams`` replace the group's rows: each new row, with the row that it continues.
    The group ends if it is ``finished``, or with an ``error``. The observer
    hears its ``reason``, else that of its first output.
    """

    group: Group
    events: list[TokenEvent] = field(default_factory=list)
    advanced: list[int] = field(default_factory=list)
    ended: list[Row] = field(default_factory=list)
    beams: Sequence[tuple[Row, Row]] = ()
    finished: bool = False
    reason: FinishReason | None = None
    error: PrefixdError | None = None

    def advances(self, row: Row) -> bool:
        """Whether ``row``, one of the rows before the step, took a token."""
        return bool(self.advanced) if self.group.beams else row.decoding.index in self.advanced

    @property
    def tokens(self) -> int:
        """Tokens chosen, of all rows together; each beam's counts."""
        return len(self.advanced) * (self.group.request.params.num_beams if self.group.beams else 1)

    @property
    def ends_group(self) -> bool:
        return self.finished or self.error is not None
