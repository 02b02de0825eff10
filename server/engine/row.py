"""A request inside the engine: a group of rows that live and die together. Torch-free.

Owns what a row and a group are made of. The scheduler decides who runs; ``postprocess`` decides what a token does to a
row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from prefixes.spec import Site
from server.engine.decoding.state import DecodingState
from server.engine.prefixes.entry import SiteBlocks
from server.engine.types import GenerationRequest

if TYPE_CHECKING:  # both import torch
    import torch

    from server.engine.decoding.beams import BeamSearch


class GroupState(Enum):
    """WAITING (for its prefix or for memory) and RUNNING alternate under preemption.

    FAILED: it could not run, and its client has not been told. ENDED is final.
    """

    WAITING = auto()
    RUNNING = auto()
    FAILED = auto()
    ENDED = auto()


@dataclass(eq=False)
class Row:
    """One sequence of the batch: its decoding, and the blocks that hold the keys and values of its first tokens."""

    decoding: DecodingState
    computed: int = 0  # tokens that have keys and values in ``blocks``
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of its full blocks that are known to prompt reuse

    @property
    def token_ids(self) -> list[int]:
        return self.decoding.token_ids

    @property
    def length(self) -> int:
        return len(self.decoding.token_ids)

    @property
    def active(self) -> bool:
        return self.decoding.active


@dataclass(frozen=True)
class Prompt:
    """Where a request's tokens go: to the decoder, or to an encoder while the decoder begins with tokens of its own."""

    encoder_ids: tuple[int, ...]
    decoder_ids: tuple[int, ...]

    @classmethod
    def of(cls, request: GenerationRequest, decoder_prompt: tuple[int, ...]) -> Prompt:
        """``decoder_prompt`` is the backbone's; empty for a decoder alone."""
        return cls(request.token_ids, decoder_prompt) if decoder_prompt else cls((), request.token_ids)


@dataclass(eq=False)
class EncodedInput:
    """An input on its way through the encoder, and afterwards what cross-attention reads. A group's rows share it.

    Its blocks first hold the current encoder layer's keys and values, in the end those of cross-attention. The next
    unit takes ``hidden (tokens, hidden)``; it is None before the first unit and after the last.
    """

    token_ids: tuple[int, ...]
    units: int
    blocks: list[int]
    done: int = 0
    hidden: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        return self.done == self.units


@dataclass(eq=False)  # groups are told apart by identity
class Group:
    """One request's rows. All times are ``time.monotonic()`` seconds."""

    request: GenerationRequest
    prompt: Prompt
    max_new_tokens: int  # the request's, cut to the window
    seed: int
    submitted_at: float
    chain_root: bytes
    rows: list[Row]
    beams: BeamSearch | None = None
    state: GroupState = GroupState.WAITING
    prefix_blocks: SiteBlocks = field(default_factory=dict)
    input: EncodedInput | None = None  # while it runs, if there is an encoder
    admitted: bool = False  # once, perhaps preempted since: it claims its prefix until it ends
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: dict[int, float] = field(default_factory=dict)  # by the index of the output
    input_computed: int = 0  # see ``note_input``

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt that the decoder reads."""
        return len(self.prompt.decoder_ids)

    def prefix_length(self, site: Site) -> int:
        return self.request.prefix_spec.length(site) if self.request.prefix_spec else 0

    def position_offset(self, site: Site) -> int:
        return self.request.prefix_spec.position_offset(site) if self.request.prefix_spec else 0

    @property
    def encoding(self) -> bool:
        """Whether its input must go through the encoder before any row can run."""
        return self.input is not None and not self.input.complete

    @property
    def input_to_compute(self) -> int:
        """Tokens of its input, or of its prompt and its input, that a group that has just begun must compute."""
        encoder = len(self.prompt.encoder_ids) if self.encoding else 0
        return encoder + self.prompt_length - self.active[0].computed

    def note_input(self) -> None:
        """Raise ``input_computed``, the most of the request's input that was computed or reused, to what is now.

        To be called before its blocks go back. Of an encoder's input it is the share of the units that are done.
        """
        if self.started:
            now = len(self.request.token_ids)
        elif self.prompt.encoder_ids:
            now = len(self.input.token_ids) * self.input.done // self.input.units if self.input else 0
        else:
            now = max(row.computed for row in self.rows)
        self.input_computed = max(self.input_computed, now)

    @property
    def active(self) -> list[Row]:
        return [row for row in self.rows if row.active]

    @property
    def started(self) -> bool:
        """Whether a token has been chosen, and so the rows have been forked from the prompt."""
        return self.rows[0].length > self.prompt_length

    def pending(self) -> list[tuple[Row, int]]:
        """The rows that have something to compute, each with the length up to which it may compute now.

        Rows share their prompt: one of them computes it, then the others fork it. Beams choose together: while one
        recomputes after a preemption, none computes its last token.
        """
        if self.encoding:
            return []
        active = self.active
        if len(active) > 1 and active[0].computed < self.prompt_length:
            return [(active[0], self.prompt_length)]
        behind = self.beams is not None and any(row.length - row.computed > 1 for row in active)
        held_back = int(behind and len(active) > 1)
        return [(row, row.length - held_back) for row in active if row.computed < row.length - held_back]
