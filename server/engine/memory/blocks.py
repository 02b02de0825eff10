"""The one memory ledger: who holds which block. Torch-free.

Owns block numbers, reference counts and the order in which idle content yields; knows neither tensors nor rows.
Block 0 is never handed out: padded table entries point at it.

A block is *held* (reference count above 0), *idle* (unheld, but its content is kept for reuse) or *free*. Idle prompt
blocks yield first, least recently used first, then idle prefixes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class OutOfBlocks(Exception):
    """Fewer blocks are available than asked for. The scheduler checks ``available`` first; rows never see this."""


class Reclaimer(Protocol):
    """Holds blocks that it can give back: the prefix store."""

    def reclaimable(self) -> int:
        """Blocks it could give back now."""

    def reclaim(self, blocks: int) -> None:
        """Give back at least ``blocks`` (or all it can)."""


class BlockLedger:
    """Reference-counted blocks of ``block_size`` token positions each."""

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 2:
            raise ValueError(f"blocks: expected at least 2 (one is padding), got {blocks}")
        self.block_size = block_size
        self.capacity = blocks - 1
        self._references = [0] * blocks
        self._free = list(range(blocks - 1, 0, -1))
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._forget: Callable[[int], None] = lambda block: None
        self._reclaimer: Reclaimer | None = None

    def set_reclaimer(self, reclaimer: Reclaimer) -> None:
        """Register the holder of idle prefixes."""
        self._reclaimer = reclaimer

    def on_forget(self, forget: Callable[[int], None]) -> None:
        """Register the function to call when a kept block's content is given up."""
        self._forget = forget

    @property
    def available(self) -> int:
        """Blocks that ``allocate`` could hand out now."""
        return len(self._free) + len(self._idle) + (self._reclaimer.reclaimable() if self._reclaimer else 0)

    @property
    def held(self) -> int:
        """Blocks with at least one holder (rows and resident prefixes)."""
        return self.capacity - len(self._free) - len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` positions take."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` blocks with one reference each; idle content yields. Raises OutOfBlocks."""
        if count > len(self._free):
            self._make_room(count)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def _make_room(self, count: int) -> None:
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks asked for, {self.available} available")
        while len(self._free) < count and self._idle:
            block, _ = self._idle.popitem(last=False)
            self._kept.discard(block)
            self._forget(block)
            self._free.append(block)
        if len(self._free) < count and self._reclaimer:
            self._reclaimer.reclaim(count - len(self._free))

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block; an idle one is held again."""
        for block in blocks:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference of each block; those without any become idle if kept, else free.

        The deepest block of a chain becomes idle first, so that it also yields first.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            assert self._references[block] == 0, f"block {block} released once too often"
            if block in self._kept:
                self._idle[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int) -> None:
        """Mark a held block's content as worth keeping once nobody holds it."""
        self._kept.add(block)

    def shared(self, block: int) -> bool:
        """Whether writing into ``block`` would be seen by another holder or spoil kept content."""
        return self._references[block] > 1 or block in self._kept

    def recount(self, holders: Iterable[Sequence[int]]) -> None:
        """After a fault between two changes: the counts become those of ``holders``. Nothing is kept for reuse."""
        self._references = [0] * len(self._references)
        for blocks in holders:
            for block in blocks:
                self._references[block] += 1
        self._kept, self._idle = set(), OrderedDict()
        self._free = [block for block in range(self.capacity, 0, -1) if self._references[block] == 0]

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Prove that the ledger's counts are exactly those of ``holders``; AssertionError names the first leak."""
        expected = [0] * len(self._references)
        for blocks in holders:
            for block in blocks:
                expected[block] += 1
        for block, (want, got) in enumerate(zip(expected, self._references, strict=True)):
            assert want == got, f"block {block}: {want} holders, {got} references"
        free, idle = set(self._free), set(self._idle)
        unheld = {block for block in range(1, len(expected)) if expected[block] == 0}
        assert len(free) == len(self._free) and not free & idle, "a block stands twice among the unheld"
        assert free | idle == unheld, f"blocks lost: {sorted(unheld - free - idle)[:8]}"
