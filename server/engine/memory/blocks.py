"""The one memory ledger: who holds which block. Torch-free.

Owns block numbers, reference counts and the order in which idle content yields; knows neither tensors nor rows.
Block 0 is never handed out: padded table entries point at it.

A block is *held* (reference count above 0), *idle* (unheld, but its content is kept for reuse) or *free*. ``shares``
says which tenant's idle content yields next: first its prompt blocks, least recently used first, then its prefixes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from server.engine.memory.shares import Kept, Shares


class OutOfBlocks(Exception):
    """Fewer blocks are available than asked for. The scheduler checks ``available`` first; rows never see this."""


class Reclaimer(Protocol):
    """Holds blocks that it can give back: the prefix store."""

    def reclaimable(self) -> int:
        """Blocks it could give back now."""

    def reclaim(self, tenant: str) -> None:
        """Give back the blocks of an idle prefix of ``tenant``, which has one."""


class BlockLedger:
    """Reference-counted blocks of ``block_size`` token positions each."""

    def __init__(self, blocks: int, block_size: int, shares: Shares | None = None) -> None:
        """``shares`` counts blocks; the reclaimer enters its own there."""
        if blocks < 2:
            raise ValueError(f"blocks: expected at least 2 (one is padding), got {blocks}")
        self.block_size = block_size
        self.capacity = blocks - 1
        self._references = [0] * blocks
        self._free = list(range(blocks - 1, 0, -1))
        self.shares = shares or Shares()
        self._kept: dict[int, str] = {}  # the tenant that keeps it
        self._idle: dict[str, OrderedDict[int, None]] = {}  # by tenant; none is empty
        self._idle_count = 0
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
        return len(self._free) + self._idle_count + (self._reclaimer.reclaimable() if self._reclaimer else 0)

    @property
    def free(self) -> int:
        """Blocks that ``allocate`` could hand out without taking idle content."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Blocks with at least one holder (rows and resident prefixes)."""
        return self.capacity - len(self._free) - self._idle_count

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
        while len(self._free) < count:
            tenant = self.shares.first_to_yield()
            if idle := self._idle.get(tenant):
                block = next(iter(idle))
                self._take_from_idle(block)
                self.shares.gone(Kept.PROMPTS, tenant, 1)
                del self._kept[block]
                self._forget(block)
                self._free.append(block)
            else:
                assert self._reclaimer is not None
                self._reclaimer.reclaim(tenant)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block; an idle one is held again."""
        for block in blocks:
            if self._references[block] == 0:
                self._take_from_idle(block)
                self.shares.used(Kept.PROMPTS, self._kept[block], -1, -1)
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
            if (tenant := self._kept.get(block)) is not None:
                self._idle.setdefault(tenant, OrderedDict())[block] = None
                self._idle_count += 1
                self.shares.used(Kept.PROMPTS, tenant, 1, 1)
            else:
                self._free.append(block)

    def keep(self, block: int, tenant: str) -> None:
        """Mark a held block's content as worth keeping for ``tenant`` once nobody holds it."""
        self._kept[block] = tenant

    def shared(self, block: int) -> bool:
        """Whether writing into ``block`` would be seen by another holder or spoil kept content."""
        return self._references[block] > 1 or block in self._kept

    def recount(self, holders: Iterable[Sequence[int]]) -> None:
        """After a fault between two changes: the counts become those of ``holders``. Nothing is kept for reuse."""
        self._references = [0] * len(self._references)
        for blocks in holders:
            for block in blocks:
                self._references[block] += 1
        self._kept, self._idle, self._idle_count = {}, {}, 0
        self.shares.forget(Kept.PROMPTS)
        self._free = [block for block in range(self.capacity, 0, -1) if self._references[block] == 0]

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Prove that the ledger's counts are exactly those of ``holders``; AssertionError names the first leak."""
        expected = [0] * len(self._references)
        for blocks in holders:
            for block in blocks:
                expected[block] += 1
        for block, (want, got) in enumerate(zip(expected, self._references, strict=True)):
            assert want == got, f"block {block}: {want} holders, {got} references"
        free, idle = set(self._free), {block for blocks in self._idle.values() for block in blocks}
        unheld = {block for block in range(1, len(expected)) if expected[block] == 0}
        assert len(free) == len(self._free) and not free & idle, "a block stands twice among the unheld"
        assert free | idle == unheld, f"blocks lost: {sorted(unheld - free - idle)[:8]}"

    def _take_from_idle(self, block: int) -> None:
        tenant = self._kept[block]
        del self._idle[tenant][block]
        self._idle_count -= 1
        if not self._idle[tenant]:
            del self._idle[tenant]
