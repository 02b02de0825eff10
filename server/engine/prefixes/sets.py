"""The prefix store's sets of entries, and the figures that they give. Torch-free.

Owns in which sets an entry belongs, the bounds, and the sums. The engine's thread alone changes them; any thread may
read the figures. Knows neither loads nor blocks' contents.
"""

from __future__ import annotations

from collections.abc import Iterable

from prefixes.spec import PrefixSpec
from server.engine.memory.blocks import BlockLedger
from server.engine.memory.shares import Kept
from server.engine.prefixes.entry import Entry, EntrySet
from server.engine.types import GenerationRequest, PrefixKey


class PrefixSets:
    """A step's questions cost the same however many prefixes are resident: sums are kept, not computed."""

    def __init__(
        self, ledger: BlockLedger, *, bytes_per_block: int, max_bytes: int | None, max_claimed_bytes: int | None
    ) -> None:
        """``max_bytes`` None is the whole pool, ``max_claimed_bytes`` None as much as ``max_bytes``."""
        self._ledger, self._bytes_per_block = ledger, bytes_per_block
        self._max_blocks = ledger.capacity if max_bytes is None else max_bytes // bytes_per_block
        self._max_claimed = self._max_blocks if max_claimed_bytes is None else max_claimed_bytes // bytes_per_block
        self._entries: dict[PrefixKey, Entry] = {}
        self._resident = EntrySet()
        self._shared = EntrySet()  # those that count in their owners' shares
        self._idle = EntrySet()  # least recently used first
        self._idle_of: dict[str, EntrySet] = {}  # by owner; none is empty
        self._pinned = EntrySet()  # in blocks or not
        self._claimed = EntrySet()  # in blocks or not
        self._unsettled: dict[PrefixKey, Entry] = {}  # pinned, not in blocks, and in host memory
        self._copy_bytes = 0

    @property
    def pinned_blocks(self) -> int:
        """Blocks of the pinned prefixes, whether they are loaded or not."""
        return self._pinned.blocks

    def pinned_blocks_beside(self, key: PrefixKey | None) -> int:
        """Blocks of the pinned prefixes other than ``key``; of all for None, the bare backbone."""
        entry = self._pinned.entries.get(key) if key else None
        return self._pinned.blocks - (entry.block_count if entry else 0)

    @property
    def max_blocks(self) -> int:
        """Blocks that resident prefixes may take together."""
        return self._max_blocks

    @property
    def max_claimed_blocks(self) -> int:
        """Blocks' worth of prefixes that may be claimed together."""
        return self._max_claimed

    @property
    def resident_bytes(self) -> int:
        return self._resident.blocks * self._bytes_per_block

    @property
    def limit_bytes(self) -> int:
        """The bound on ``resident_bytes``."""
        return self._max_blocks * self._bytes_per_block

    @property
    def copy_bytes(self) -> int:
        """Bytes of claimed prefixes that have left their blocks, in host memory."""
        return self._copy_bytes

    @property
    def resident_count(self) -> int:
        return len(self._resident.entries)

    def residents(self) -> frozenset[PrefixKey]:
        """Keys that are in blocks."""
        return frozenset(list(self._resident.entries))

    def block_count(self, spec: PrefixSpec) -> int:
        """Blocks that a prefix of ``spec`` takes, all sites together."""
        return sum(self._ledger.blocks_for(site.length) for site in spec.sites.values())

    def reclaimable(self) -> int:
        """Blocks that idle prefixes hold."""
        return self._idle.blocks

    def holdings(self) -> list[tuple[int, ...]]:
        """Every block list that resident prefixes hold, for the integrity check."""
        return [blocks for entry in self._resident.entries.values() for blocks in (entry.blocks or {}).values()]

    def idle(self) -> bool:
        """Whether no prefix has a waiter, a user or a claim, and no copy is left."""
        held = any(entry.waiters or entry.users or entry.claims for entry in self._entries.values())
        return not held and self._copy_bytes == 0

    def _entry(self, key: PrefixKey, spec: PrefixSpec) -> Entry:
        if (entry := self._entries.get(key)) is None:
            entry = self._entries[key] = Entry(spec, self.block_count(spec))
        return entry

    def _entries_of(self, requests: Iterable[GenerationRequest]) -> list[Entry]:
        """One for each request that has a prefix."""
        return [self._entry(r.prefix, r.prefix_spec) for r in requests if r.prefix and r.prefix_spec]

    def _file(self, key: PrefixKey, entry: Entry) -> None:
        """Put the entry into the sets that its place decides, as the last to join, and remove it from the others."""
        self._resident.put(key, entry, entry.resident)
        self._share_out(key, entry, counts=entry.shared_out)
        self._unsettled.pop(key, None)
        if entry.pinned and entry.host is not None:
            self._unsettled[key] = entry

    def _share_out(self, key: PrefixKey, entry: Entry, *, counts: bool) -> None:
        """Note whether the entry ``counts`` in its owner's share, and whether it can yield."""
        own = self._idle_of.setdefault(key.tenant, EntrySet())
        own.put(key, entry, entry.idle)
        if not own.entries:
            del self._idle_of[key.tenant]
        kept, idle = self._shared.put(key, entry, counts), self._idle.put(key, entry, entry.idle)
        if kept == idle < 0:
            self._ledger.shares.gone(Kept.PREFIXES, key.tenant, -idle)
        else:
            self._ledger.shares.used(Kept.PREFIXES, key.tenant, kept, idle)

    def _file_all(self) -> None:
        """Make all sets and sums anew of the entries; idle ones keep their order."""
        order = dict.fromkeys([*self._idle.entries, *self._entries])
        self._resident, self._idle, self._pinned, self._claimed, self._shared = (EntrySet() for _ in range(5))
        self._idle_of = {}
        self._ledger.shares.forget(Kept.PREFIXES)
        self._unsettled, self._copy_bytes = {}, sum(entry.copy_bytes for entry in self._entries.values())
        for key in order:
            if entry := self._entries.get(key):
                self._file(key, entry)
                self._pinned.put(key, entry, entry.pinned)
                self._claimed.put(key, entry, entry.claims > 0)

    def _fits(self, key: PrefixKey, entry: Entry, extra_blocks: int) -> bool:
        """Whether the entry's blocks, if it has none yet, and so many more can be had."""
        if entry.resident:
            return self._ledger.available >= extra_blocks
        busy = self._resident.blocks - self._idle.blocks
        fits = busy + entry.block_count <= self._max_blocks
        fits = fits and self._ledger.available >= entry.block_count + extra_blocks
        return fits and (entry.pinned or self._may_take(key.tenant, entry.block_count))

    def _may_take(self, owner: str, blocks: int) -> bool:
        """Whether ``owner`` may have room for one more prefix now. Where it may not, it waits for rows that run.

        It waits for its own rows rather than push out what tenants keep that keep less. It waits for rows of a tenant
        that keeps more rather than push out a prefix of its own.
        """
        shares, prefixes, prompts = self._ledger.shares, Kept.PREFIXES, Kept.PROMPTS
        too_many, lacking = self._resident.blocks + blocks - self._max_blocks, blocks - self._ledger.free
        lacking -= shares.idle(prompts, owner)
        for needed, kinds in ((too_many, (prefixes,)), (lacking, (prefixes, prompts))):
            if needed > 0 and needed > (others := shares.yielding_to(owner, blocks, kinds)):
                if shares.outdone(owner, blocks):
                    return False
                if needed > others + shares.idle(prefixes, owner) and shares.in_use(prefixes, owner):
                    return False
        return True
