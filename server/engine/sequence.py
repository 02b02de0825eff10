"""A request while it runs: a group of rows that live and die together. Torch-free.

Owns the state that survives preemption (tokens, scores, detokenizers, counters); the scheduler owns who runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from server.engine.detokenizer import Detokenizer
from server.engine.types import FinishReason, GenerationRequest, TokenLogprob

if TYPE_CHECKING:
    from server.engine.beams import BeamSearch


class GroupState(Enum):
    """WAITING (for its prefix or for memory) and RUNNING alternate under preemption; ENDED is final."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(eq=False)
class Sequence:
    """One row: its tokens, how many of them have keys and values in ``blocks``, and its output so far."""

    index: int
    token_ids: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of its full blocks that are known to prompt reuse
    detokenizer: Detokenizer | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    last_token_at: float = 0.0

    @property
    def active(self) -> bool:
        return self.finish_reason is None


@dataclass(eq=False)  # groups are told apart by identity, quickly: they are removed from long lists
class Group:
    """One request's rows. All times are ``time.monotonic()`` seconds."""

    request: GenerationRequest
    max_new_tokens: int  # the request's, cut to the window
    seed: int
    submitted_at: float
    chain_root: bytes
    sequences: list[Sequence]
    beams: BeamSearch | None = None
    state: GroupState = GroupState.WAITING
    prefix_blocks: tuple[int, ...] = ()
    admitted_at: float | None = None
    first_token_at: float | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.request.token_ids)

    @property
    def prefix_length(self) -> int:
        return self.request.prefix_spec.length("decoder") if self.request.prefix_spec else 0

    @property
    def position_offset(self) -> int:
        return self.request.prefix_spec.position_offset("decoder") if self.request.prefix_spec else 0

    @property
    def active(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.active]

    @property
    def started(self) -> bool:
        """Whether the rows have been forked from the prompt: a token has been chosen."""
        return len(self.sequences[0].token_ids) > self.prompt_length

    def generated(self, sequence: Sequence) -> list[int]:
        return sequence.token_ids[self.prompt_length :]

    def pending(self) -> list[tuple[Sequence, int]]:
        """The rows that have something to compute, each with the length up to which it may compute now.

        Several rows share their prompt: one of them computes it, then the others fork it. Beams choose together: while
        one recomputes what preemption took, none computes its last token.
        """
        active = self.active
        if len(active) > 1 and active[0].computed < self.prompt_length:
            return [(active[0], self.prompt_length)]
        behind = self.beams is not None and any(len(row.token_ids) - row.computed > 1 for row in active)
        hold = int(behind and len(active) > 1)
        return [(row, len(row.token_ids) - hold) for row in active if row.computed < len(row.token_ids) - hold]
