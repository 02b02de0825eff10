"""Whether a request fits into the memory of an engine that runs nothing else. Torch-free.

Owns the bound that ``admission`` checks and the scheduler relies on: what fits alone is never preempted while it is
alone. Any thread may call it.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefixes.errors import InputTooLong
from server.engine.memory.blocks import BlockLedger
from server.engine.prefixes.store import PrefixStore
from server.engine.row import Group, Prompt
from server.engine.types import GenerationRequest


@dataclass(frozen=True)
class Capacity:
    """Counts over one ledger and the prefixes in it."""

    ledger: BlockLedger
    prefixes: PrefixStore

    def needed(self, request: GenerationRequest, prompt: Prompt, max_new_tokens: int) -> int:
        """The most blocks that the request can need, its prefix's included."""
        blocks_for, rows = self.ledger.blocks_for, request.params.rows
        length = len(prompt.decoder_ids)
        if rows == 1:
            own = blocks_for(length + max_new_tokens)
        else:  # each row may copy the prompt's last block, and shares none of its own tokens in the worst case
            own = blocks_for(length) + rows * (blocks_for(max_new_tokens) + 1)
        prefix = self.prefixes.block_count(request.prefix_spec) if request.prefix and request.prefix_spec else 0
        return own + blocks_for(len(prompt.encoder_ids)) + prefix

    def room(self, request: GenerationRequest) -> int:
        """Blocks that the request can have: all but those of other pinned prefixes."""
        return self.ledger.capacity - self.prefixes.pinned_blocks_beside(request.prefix)

    def no_room(self, group: Group) -> InputTooLong:
        """Why a group that is alone and lacks blocks ends."""
        needed = self.needed(group.request, group.prompt, group.max_new_tokens)
        room = self.room(group.request)
        return InputTooLong(
            f"memory: the request may need {needed} blocks, pinned prefixes leave {room}; ask for fewer tokens or "
            "rows, or unpin a prefix",
            expected=room,
            got=needed,
        )
