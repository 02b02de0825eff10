"""Resident prefixes: load, pin, evict.

Owns which prefixes are in blocks, who uses them, and in which order idle ones yield. ``loader`` fetches and verifies
them. The engine's thread alone calls it, except for the figures. Knows no scheduler and no registry: it gets ``load``.

A step's questions cost the same however many prefixes are resident: sums are kept, not computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefixes.errors import EngineFailure, PrefixdError
from prefixes.spec import PrefixSpec, Site
from server.engine.memory.blocks import BlockLedger
from server.engine.observer import EngineObserver
from server.engine.prefixes.entry import Entry, EntrySet, LoadStatus, SiteBlocks
from server.engine.prefixes.loader import PrefixLoader
from server.engine.types import PrefixKey

if TYPE_CHECKING:
    from prefixes.artifact import Prefix

log = logging.getLogger(__name__)


class PrefixStore:
    """Bounded by bytes. Evicts the least recently used first, never one that a running group uses or a pin keeps."""

    def __init__(
        self,
        ledger: BlockLedger,
        load: Callable[[PrefixKey], Prefix],
        write: Callable[[Prefix, SiteBlocks], None],
        *,
        bytes_per_block: int,
        max_bytes: int | None,
        workers: int,
        max_staged_bytes: int,
        observer: EngineObserver,
        wake: Callable[[], None],
    ) -> None:
        self._ledger, self._write = ledger, write
        self._bytes_per_block = bytes_per_block
        self._max_blocks = ledger.capacity if max_bytes is None else max_bytes // bytes_per_block
        self._observer = observer
        self._loader = PrefixLoader(
            load, workers=workers, max_staged_bytes=max_staged_bytes, observer=observer, wake=wake
        )
        self._entries: dict[PrefixKey, Entry] = {}
        self._resident = EntrySet()
        self._idle = EntrySet()  # least recently used first
        self._pinned = EntrySet()  # in blocks
        self._unsettled: dict[PrefixKey, Entry] = {}  # pinned and loaded, not in blocks
        ledger.set_reclaimer(self)

    # --- waiting groups ---

    def want(self, key: PrefixKey) -> None:
        """A group waits for ``key``: load it unless it is resident or loaded."""
        entry = self._entries.setdefault(key, Entry())
        entry.waiters += 1
        self._ensure_loading(key, entry)

    def unwant(self, key: PrefixKey) -> None:
        """A group no longer waits for ``key``."""
        entry = self._entries[key]
        entry.waiters -= 1
        if entry.pinned and entry.waiters == 0 and (entry.loading or entry.host):
            self._loader.ask(key, urgent=False)
        self._drop_if_unused(key, entry)

    def status(self, key: PrefixKey) -> LoadStatus:
        """The status of a wanted key, as of the last ``settle``."""
        return self._entries[key].status

    def error(self, key: PrefixKey) -> PrefixdError:
        """Why loading a FAILED key failed."""
        error = self._entries[key].error
        assert error is not None
        return error

    # --- running groups ---

    def try_acquire(self, key: PrefixKey, extra_blocks: int) -> SiteBlocks | None:
        """Hold ``key``'s blocks for a group that needs ``extra_blocks`` more of its own; None if there is no room.

        A READY key that is not in blocks moves into them; idle prefixes may yield to it. If it cannot be written, it
        becomes FAILED.
        """
        entry = self._entries[key]
        entry.users += 1
        self._file(key, entry)  # no longer idle: making room must not evict it
        if not entry.resident and self._fits(entry, extra_blocks):
            self._make_resident(key, entry)
        if entry.resident and self._fits(entry, extra_blocks):
            return entry.blocks
        self.release(key)
        return None

    def release(self, key: PrefixKey) -> None:
        """A group no longer uses ``key``'s blocks; they stay resident until the room is needed."""
        entry = self._entries[key]
        entry.users -= 1
        self._file(key, entry)

    # --- pins ---

    def pin(self, key: PrefixKey) -> None:
        """Load ``key`` and never evict it. It moves into blocks at its first use, or when ``settle`` finds room."""
        entry = self._entries.setdefault(key, Entry())
        entry.pinned = True
        self._file(key, entry)
        self._ensure_loading(key, entry)

    def unpin(self, key: PrefixKey) -> None:
        """Let ``key`` be evicted again."""
        entry = self._entries.get(key)
        if entry:
            entry.pinned = False
            self._file(key, entry)
            self._drop_if_unused(key, entry)

    # --- loads ---

    @property
    def has_news(self) -> bool:
        """Whether ``settle`` would do anything."""
        return self._loader.has_ended or any(self._fits(entry, 0) for entry in self._unsettled.values())

    def settle(self) -> list[PrefixKey]:
        """Take in loads that have ended, and move loaded pins into blocks where there is room.

        Returns the keys whose loads have ended and that are still wanted or pinned: each is READY or FAILED now.
        """
        ended = [key for key in self._loader.take_ended() if self._take_in(key)]
        for key, entry in list(self._unsettled.items()):
            if self._fits(entry, 0):
                self._make_resident(key, entry)
        return ended

    # --- figures ---

    @property
    def pinned_blocks(self) -> int:
        return self._pinned.blocks

    def pinned_blocks_beside(self, key: PrefixKey) -> int:
        """Blocks of the pinned prefixes other than ``key``."""
        entry = self._pinned.entries.get(key)
        return self._pinned.blocks - (entry.block_count if entry else 0)

    @property
    def max_blocks(self) -> int:
        """Blocks that resident prefixes may take together."""
        return self._max_blocks

    @property
    def resident_bytes(self) -> int:
        return self._resident.blocks * self._bytes_per_block

    @property
    def limit_bytes(self) -> int:
        """The bound on ``resident_bytes``."""
        return self._max_blocks * self._bytes_per_block

    @property
    def staged_bytes(self) -> int:
        """Bytes of prefixes that are loaded and not in blocks, in host memory."""
        return self._loader.staged_bytes

    @property
    def resident_count(self) -> int:
        return len(self._resident.entries)

    def residents(self) -> frozenset[PrefixKey]:
        """Keys that are in blocks."""
        return frozenset(list(self._resident.entries))

    def block_count(self, spec: PrefixSpec) -> int:
        """Blocks that a prefix of ``spec`` takes, all sites together."""
        return sum(self._ledger.blocks_for(site.length) for site in spec.sites.values())

    # --- for the ledger and the integrity check ---

    def reclaimable(self) -> int:
        return self._idle.blocks

    def reclaim(self, blocks: int) -> None:
        while blocks > 0 and self._idle.entries:
            key, entry = next(iter(self._idle.entries.items()))
            blocks -= entry.block_count
            self._evict(key, entry)

    def holdings(self) -> list[tuple[int, ...]]:
        """Every block list that resident prefixes hold."""
        return [blocks for entry in self._resident.entries.values() for blocks in (entry.blocks or {}).values()]

    def idle(self) -> bool:
        """Whether no prefix has a waiter or a user."""
        return all(entry.waiters == 0 and entry.users == 0 for entry in self._entries.values())

    def close(self) -> None:
        """Stop the loaders; loads under way are abandoned."""
        self._loader.close()

    # --- inside ---

    def _file(self, key: PrefixKey, entry: Entry) -> None:
        """Put the entry into every set that it belongs to, as the last to join, and remove it from the others."""
        self._resident.put(key, entry, entry.resident)
        self._idle.put(key, entry, entry.idle)
        self._pinned.put(key, entry, entry.pinned and entry.resident)
        self._unsettled.pop(key, None)
        if entry.pinned and entry.host is not None:
            self._unsettled[key] = entry

    def _ensure_loading(self, key: PrefixKey, entry: Entry) -> None:
        if entry.resident:
            return
        if entry.host is None and not entry.loading:
            if entry.error and entry.waiters > 1:
                return  # groups that waited before are told of the failure first
            entry.error, entry.loading = None, True
        self._loader.ask(key, urgent=entry.waiters > 0)

    def _take_in(self, key: PrefixKey) -> bool:
        """Take in a load that has ended; False if the load was dropped meanwhile."""
        entry = self._entries.get(key)
        outcome = self._loader.outcome(key) if entry and entry.loading else None
        if entry is None or outcome is None:
            return False
        entry.loading = False
        if isinstance(outcome, PrefixdError):
            entry.error = outcome
            self._loader.drop(key)
        else:
            entry.host = outcome
            self._file(key, entry)
        return True

    def _fits(self, entry: Entry, extra_blocks: int) -> bool:
        if entry.resident:
            return self._ledger.available >= extra_blocks
        assert entry.host is not None
        count, busy = self.block_count(entry.host.spec), self._resident.blocks - self._idle.blocks
        return busy + count <= self._max_blocks and self._ledger.available >= count + extra_blocks

    def _make_resident(self, key: PrefixKey, entry: Entry) -> None:
        assert entry.host is not None
        count = self.block_count(entry.host.spec)
        self.reclaim(self._resident.blocks + count - self._max_blocks)
        blocks = self._ledger.allocate(count)
        taken: dict[Site, tuple[int, ...]] = {}
        for site, prefix in entry.host.spec.sites.items():
            size = self._ledger.blocks_for(prefix.length)
            taken[site], blocks = tuple(blocks[:size]), blocks[size:]
        try:
            self._write(entry.host, taken)
        except Exception as error:
            facts = {"tenant": key.tenant, "version": key.version}
            log.exception("a prefix could not be written to its blocks", extra={"facts": facts})
            for site_blocks in taken.values():
                self._ledger.release(site_blocks)
            entry.error = EngineFailure(f"prefix: writing failed with {type(error).__name__}")
        else:
            entry.blocks, entry.block_count = taken, count
        entry.host = None
        self._file(key, entry)
        self._loader.drop(key)

    def _evict(self, key: PrefixKey, entry: Entry) -> None:
        blocks, count = entry.blocks, entry.block_count
        assert blocks is not None
        entry.blocks = None
        self._file(key, entry)
        entry.block_count = 0
        for site_blocks in blocks.values():
            self._ledger.release(site_blocks)
        self._observer.on_prefix_evicted(count * self._bytes_per_block)
        if entry.waiters:
            self._ensure_loading(key, entry)
        self._drop_if_unused(key, entry)

    def _drop_if_unused(self, key: PrefixKey, entry: Entry) -> None:
        if entry.unused:
            del self._entries[key]
            self._loader.drop(key)  # also a load that has begun
