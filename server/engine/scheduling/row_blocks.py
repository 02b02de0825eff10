"""The block tables of rows and of encoded inputs: how they begin, grow, are shared, remembered and given back.

Owns every change to ``Row.blocks`` and ``EncodedInput.blocks``; the scheduler asks the ledger for room first.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from server.engine.memory.blocks import BlockLedger
from server.engine.memory.prompt_reuse import PromptReuse, chain
from server.engine.row import EncodedInput, Group, Row
from server.engine.scheduling.plan import ScheduledRow


@dataclass(frozen=True)
class Beginning:
    """The blocks that a group begins with. Reused ones are already held for it; ``missing`` ones are to be allocated.

    ``digests`` belong to the prompt's reused ``blocks``. An input is reused whole or not at all.
    """

    blocks: list[int]
    digests: list[bytes]
    missing: int
    input_blocks: list[int]
    input_missing: int


class RowBlocks:
    """Changes rows' block tables over one ledger; ``reuse`` None remembers no prompts."""

    def __init__(self, ledger: BlockLedger, reuse: PromptReuse | None, encoder_units: int) -> None:
        self._ledger, self._reuse, self._encoder_units = ledger, reuse, encoder_units

    # --- a group begins ---

    def find(self, group: Group) -> Beginning:
        """What the group could begin with; ``begin`` or ``give_up`` must follow."""
        leader, tokens = group.active[0], len(group.prompt.encoder_ids)
        shared = group.prompt_length if len(group.active) > 1 else leader.length
        blocks: list[int] = []
        digests: list[bytes] = []
        input_blocks: list[int] = []
        if self._reuse:
            blocks, digests = self._reuse.match(group.chain_root, leader.token_ids[:shared])
            input_blocks = self._reuse.match_input(group.chain_root, self._ledger.blocks_for(tokens)) if tokens else []
        input_missing = 0 if input_blocks else self._ledger.blocks_for(tokens)
        return Beginning(blocks, digests, self._ledger.blocks_for(shared) - len(blocks), input_blocks, input_missing)

    def give_up(self, beginning: Beginning) -> None:
        """Give back what ``find`` held."""
        self._ledger.release(beginning.blocks)
        self._ledger.release(beginning.input_blocks)

    def begin(self, group: Group, beginning: Beginning) -> None:
        """Allocate what is missing, and give all blocks to the group's first active row and its input."""
        if group.prompt.encoder_ids:
            done = 0 if beginning.input_missing else self._encoder_units
            blocks = beginning.input_blocks + self._ledger.allocate(beginning.input_missing)
            group.input = EncodedInput(group.prompt.encoder_ids, self._encoder_units, blocks, done)
        leader = group.active[0]
        leader.blocks = beginning.blocks + self._ledger.allocate(beginning.missing)
        leader.digests, leader.computed = beginning.digests, len(beginning.blocks) * self._ledger.block_size

    # --- a step ---

    def growth(self, scheduled: ScheduledRow) -> int:
        """Blocks that the row still needs for this step: new ones, and one to copy a shared block into."""
        return self._new(scheduled) + self._must_copy(scheduled)

    def grow(self, scheduled: ScheduledRow) -> list[tuple[int, int]]:
        """Give the row those blocks. Returns what is to be copied: (source, target)."""
        row, copies = scheduled.row, []
        if self._must_copy(scheduled):
            first = scheduled.start // self._ledger.block_size
            source, [target] = row.blocks[first], self._ledger.allocate(1)
            copies.append((source, target))
            row.blocks[first] = target
            self._ledger.release([source])
        row.blocks += self._ledger.allocate(self._new(scheduled))
        return copies

    def _new(self, scheduled: ScheduledRow) -> int:
        return max(0, self._ledger.blocks_for(scheduled.end) - len(scheduled.row.blocks))

    def _must_copy(self, scheduled: ScheduledRow) -> bool:
        first, blocks = scheduled.start // self._ledger.block_size, scheduled.row.blocks
        return first < len(blocks) and self._ledger.shared(blocks[first])

    # --- after a step ---

    def computed(self, scheduled: ScheduledRow, *, finite: bool) -> None:
        """Note that the row's tokens have keys and values. A prompt that is through goes to all rows.

        ``finite``: the row has chosen a token, so its logits and all that they were computed from are finite. Its full
        blocks become reusable.
        """
        group, row = scheduled.group, scheduled.row
        row.computed = scheduled.end
        # Beams' own tokens are not worth remembering: most of the beams are given up.
        if finite and self._reuse and (group.beams is None or scheduled.end <= group.prompt_length):
            self._remember(self._reuse, group, row)
        if scheduled.end == group.prompt_length:
            self._fork_prompt(group, row)

    def encoded(self, group: Group) -> None:
        """Make the group's input, which is encoded now, reusable."""
        if self._reuse and group.input:
            self._reuse.remember_input(group.chain_root, group.input.blocks, group.request.caller)

    def continue_beams(self, group: Group, beams: Sequence[tuple[Row, Row]]) -> None:
        """Give each new row the blocks of the row that it continues, and replace the group's rows by the new ones."""
        for row, parent in beams:
            self._ledger.share(parent.blocks)
            row.blocks, row.computed = list(parent.blocks), parent.computed
        self._release_rows(group.rows)
        group.rows = [row for row, _ in beams]

    def _fork_prompt(self, group: Group, leader: Row) -> None:
        blocks = leader.blocks[: self._ledger.blocks_for(group.prompt_length)]
        for row in group.active:
            if row is not leader:
                self._ledger.share(blocks)
                row.blocks, row.computed, row.digests = list(blocks), group.prompt_length, list(leader.digests)

    def _remember(self, reuse: PromptReuse, group: Group, row: Row) -> None:
        size = self._ledger.block_size
        for index in range(len(row.digests), row.computed // size):
            parent = row.digests[-1] if row.digests else group.chain_root
            digest = chain(parent, row.token_ids[index * size : (index + 1) * size])
            row.digests.append(digest)
            reuse.remember(digest, row.blocks[index], group.request.caller)

    # --- giving back ---

    def release_row(self, row: Row) -> None:
        """Give the row's blocks back: its output is complete, or it will be recomputed."""
        self._ledger.release(row.blocks)
        row.blocks, row.computed, row.digests = [], 0, []

    def release(self, group: Group) -> None:
        """Give back the blocks of all of the group's rows and of its input."""
        group.note_input()
        self._release_rows(group.rows)
        if group.input:
            self._ledger.release(group.input.blocks)
            group.input = None

    def recount(self, holders: Iterable[Sequence[int]]) -> None:
        """After a fault between two changes: ``holders`` have all blocks that are held. Nothing is kept for reuse."""
        if self._reuse:
            self._reuse.clear()
        self._ledger.recount(holders)

    def _release_rows(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.release_row(row)

    def tables(self, groups: Iterable[Group]) -> Iterator[list[int]]:
        """Every block table of running groups, for the integrity check."""
        for group in groups:
            yield from (row.blocks for row in group.rows)
            if group.input:
                yield group.input.blocks
