"""A request while it runs: a group of rows that live and die together. Torch-free.

Owns the state that survives preemption (tokens, scores, detokenizers, counters); the scheduler owns who runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from prefixes.spec import Site
from server.engine.decoding.detokenizer import Detokenizer
from server.engine.types import FinishReason, GenerationRequest, TokenLogprob

if TYPE_CHECKING:
    import torch

    from server.engine.decoding.beams import BeamSearch
    from server.engine.prefixes.store import SiteBlocks


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


@dataclass(frozen=True)
class Prompt:
    """Where a request's tokens go: to the decoder, or to an encoder, whose decoder begins with tokens of its own."""

    encoder_ids: tuple[int, ...]
    decoder_ids: tuple[int, ...]

    @classmethod
    def of(cls, request: GenerationRequest, decoder_prompt: tuple[int, ...]) -> Prompt:
        """``decoder_prompt`` is the backbone's; empty for a decoder alone."""
        return cls(request.token_ids, decoder_prompt) if decoder_prompt else cls((), request.token_ids)


@dataclass(eq=False)
class EncodedInput:
    """An input on its way through the encoder, and then what cross-attention reads, shared by all rows of its group.

    Its blocks first hold each encoder layer's own keys and values, then those of cross-attention. ``hidden`` is what
    the next unit takes, ``(tokens, hidden)``; None before the first unit and after the last.
    """

    token_ids: tuple[int, ...]
    units: int
    blocks: list[int]
    done: int = 0
    hidden: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        return self.done == self.units


@dataclass(eq=False)  # groups are told apart by identity, quickly: they are removed from long lists
class Group:
    """One request's rows. All times are ``time.monotonic()`` seconds."""

    request: GenerationRequest
    prompt: Prompt
    max_new_tokens: int  # the request's, cut to the window
    seed: int
    submitted_at: float
    chain_root: bytes
    sequences: list[Sequence]
    beams: BeamSearch | None = None
    state: GroupState = GroupState.WAITING
    prefix_blocks: SiteBlocks = field(default_factory=dict)
    input: EncodedInput | None = None  # while it runs, where there is an encoder
    admitted_at: float | None = None
    first_token_at: float | None = None

    @property
    def prompt_length(self) -> int:
        """Of the decoder's tokens."""
        return len(self.prompt.decoder_ids)

    def prefix_length(self, site: Site) -> int:
        return self.request.prefix_spec.length(site) if self.request.prefix_spec else 0

    def position_offset(self, site: Site) -> int:
        return self.request.prefix_spec.position_offset(site) if self.request.prefix_spec else 0

    @property
    def encoding(self) -> bool:
        """Whether its input has to go through the encoder before any row can run."""
        return self.input is not None and not self.input.complete

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
        if self.encoding:
            return []
        active = self.active
        if len(active) > 1 and active[0].computed < self.prompt_length:
            return [(active[0], self.prompt_length)]
        behind = self.beams is not None and any(len(row.token_ids) - row.computed > 1 for row in active)
        hold = int(behind and len(active) > 1)
        return [(row, len(row.token_ids) - hold) for row in active if row.computed < len(row.token_ids) - hold]
