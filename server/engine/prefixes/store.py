"""Resident prefixes: load, pin, evict.

Owns which prefixes are in blocks, who uses them and in which order idle ones yield. Loading (fetch, verify) is
``prefix_loader``'s; everything here is called from the engine's thread alone. Knows no scheduler and no registry: it
gets ``load``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from prefixes.errors import EngineFailure, PrefixdError
from prefixes.spec import PrefixSpec, Site
from server.engine.memory.blocks import BlockLedger
from server.engine.observer import EngineObserver
from server.engine.prefixes.loader import PrefixLoader
from server.engine.types import PrefixKey

if TYPE_CHECKING:
    from prefixes.artifact import Prefix

log = logging.getLogger(__name__)

SiteBlocks = Mapping[Site, tuple[int, ...]]


class LoadStatus(Enum):
    """LOADING or in line for it, READY to take blocks (or in them already), FAILED for those who waited."""

    LOADING = auto()
    READY = auto()
    FAILED = auto()


@dataclass
class _Entry:
    loading: bool = False
    host: Prefix | None = None  # loaded, not in blocks: staged
    error: PrefixdError | None = None
    blocks: SiteBlocks | None = None
    waiters: int = 0  # waiting rows: they pin the version, not its blocks
    users: int = 0  # running groups: their blocks stay
    pinned: bool = False
    block_count: int = 0

    @property
    def evictable(self) -> bool:
        return self.blocks is not None and self.users == 0 and not self.pinned


class PrefixStore:
    """Byte-bounded, least recently used first out, never under a running row or a pin."""

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
        # Least recently used first. A plain dict: other threads snapshot it, and copying an OrderedDict calls back into
        # the keys' hashes, so that the engine's thread could change it half-way.
        self._entries: dict[PrefixKey, _Entry] = {}
        self._resident_blocks = 0
        ledger.set_reclaimer(self)

    # --- waiting rows ---

    def want(self, key: PrefixKey) -> None:
        """A row waits for ``key``: start loading it unless it is here."""
        entry = self._entries.setdefault(key, _Entry())
        entry.waiters += 1
        self._ensure_loading(key, entry)

    def unwant(self, key: PrefixKey) -> None:
        """A row no longer waits."""
        entry = self._entries[key]
        entry.waiters -= 1
        if entry.pinned and entry.waiters == 0 and (entry.loading or entry.host):
            self._loader.ask(key, urgent=False)
        self._drop_if_unused(key, entry)

    def status(self, key: PrefixKey) -> LoadStatus:
        """Of a wanted key."""
        entry = self._entries[key]
        self._settle(key, entry)
        if entry.blocks is not None or entry.host is not None:
            return LoadStatus.READY
        return LoadStatus.FAILED if entry.error else LoadStatus.LOADING

    def error(self, key: PrefixKey) -> PrefixdError:
        """Why loading a FAILED key failed."""
        error = self._entries[key].error
        assert error is not None
        return error

    # --- running rows ---

    def try_acquire(self, key: PrefixKey, extra_blocks: int) -> SiteBlocks | None:
        """Hold ``key``'s blocks for a group that needs ``extra_blocks`` more of its own; None if there is no room.

        A READY key moves into blocks here; idle prefixes may yield to it. One that cannot be written becomes FAILED.
        """
        entry = self._entries[key]
        entry.users += 1  # so that it is not reclaimed to make room for itself
        if entry.blocks is None and self._fits(entry, extra_blocks):
            self._make_resident(key, entry)
        if entry.blocks is None or not self._fits(entry, extra_blocks):
            entry.users -= 1
            return None
        self._touch(key)
        return entry.blocks

    def release(self, key: PrefixKey) -> None:
        """A group no longer uses ``key``'s blocks; they stay resident until somebody needs the room."""
        entry = self._entries[key]
        entry.users -= 1
        self._touch(key)

    # --- pins ---

    def pin(self, key: PrefixKey) -> None:
        """Keep ``key`` resident from its first use or ``settle_pins`` on, whatever the pressure."""
        entry = self._entries.setdefault(key, _Entry())
        entry.pinned = True
        self._ensure_loading(key, entry)

    def unpin(self, key: PrefixKey) -> None:
        """Let ``key`` be evicted again."""
        entry = self._entries.get(key)
        if entry:
            entry.pinned = False
            self._drop_if_unused(key, entry)

    def settle_pins(self) -> None:
        """Move loaded pinned prefixes into blocks where there is room."""
        for key, entry in list(self._entries.items()):  # making room evicts, which drops entries
            if self._can_settle(key, entry):
                self._make_resident(key, entry)

    def pins_can_settle(self) -> bool:
        """Whether ``settle_pins`` would do anything."""
        return any(self._can_settle(key, entry) for key, entry in self._entries.items())

    # --- accounting ---

    @property
    def pinned_blocks(self) -> int:
        return sum(entry.block_count for entry in list(self._entries.values()) if entry.pinned)

    def pinned_blocks_beside(self, key: PrefixKey) -> int:
        """Blocks of the pinned prefixes other than ``key``."""
        return sum(entry.block_count for other, entry in list(self._entries.items()) if entry.pinned and other != key)

    @property
    def max_blocks(self) -> int:
        """Blocks that resident prefixes may take together."""
        return self._max_blocks

    @property
    def resident_bytes(self) -> int:
        return self._resident_blocks * self._bytes_per_block

    @property
    def limit_bytes(self) -> int:
        """What ``resident_bytes`` stays within."""
        return self._max_blocks * self._bytes_per_block

    @property
    def staged_bytes(self) -> int:
        """Bytes of prefixes that are loaded and not in blocks, in host memory."""
        return self._loader.staged_bytes

    def residents(self) -> frozenset[PrefixKey]:
        """Keys that are in blocks."""
        return frozenset(key for key, entry in list(self._entries.items()) if entry.blocks is not None)

    def block_count(self, spec: PrefixSpec) -> int:
        """Blocks that a prefix of ``spec`` takes, all sites together."""
        return sum(self._ledger.blocks_for(site.length) for site in spec.sites.values())

    def holdings(self) -> list[tuple[int, ...]]:
        """Every block list that resident prefixes hold, for the integrity check."""
        return [blocks for entry in self._entries.values() if entry.blocks for blocks in entry.blocks.values()]

    def idle(self) -> bool:
        """No waiter and no user is left."""
        return all(entry.waiters == 0 and entry.users == 0 for entry in self._entries.values())

    def reclaimable(self) -> int:
        return sum(entry.block_count for entry in self._entries.values() if entry.evictable)

    def reclaim(self, blocks: int) -> None:
        for key, entry in list(self._entries.items()):
            if blocks <= 0:
                return
            if entry.evictable:
                blocks -= entry.block_count
                self._evict(key, entry)

    def close(self) -> None:
        """Stop the loaders; loads under way are abandoned."""
        self._loader.close()

    # --- inside ---

    def _touch(self, key: PrefixKey) -> None:
        self._entries[key] = self._entries.pop(key)

    def _ensure_loading(self, key: PrefixKey, entry: _Entry) -> None:
        if entry.blocks is not None:
            return
        if entry.host is None and not entry.loading:
            if entry.error and entry.waiters > 1:
                return  # those who waited before hear of the failure first
            entry.error, entry.loading = None, True
        self._loader.ask(key, urgent=entry.waiters > 0)

    def _settle(self, key: PrefixKey, entry: _Entry) -> None:
        """Take over what a finished load brought."""
        outcome = self._loader.outcome(key) if entry.loading else None
        if outcome is None:
            return
        entry.loading = False
        if isinstance(outcome, PrefixdError):
            entry.error = outcome
            self._loader.drop(key)
        else:
            entry.host = outcome

    def _can_settle(self, key: PrefixKey, entry: _Entry) -> bool:
        if entry.pinned:
            self._settle(key, entry)
        return entry.pinned and entry.host is not None and self._fits(entry, 0)

    def _fits(self, entry: _Entry, extra_blocks: int) -> bool:
        if entry.blocks is not None:
            return self._ledger.available >= extra_blocks
        assert entry.host is not None
        count = self.block_count(entry.host.spec)
        busy = sum(e.block_count for e in self._entries.values() if e.blocks is not None and not e.evictable)
        return busy + count <= self._max_blocks and self._ledger.available >= count + extra_blocks

    def _make_resident(self, key: PrefixKey, entry: _Entry) -> None:
        assert entry.host is not None
        count = self.block_count(entry.host.spec)
        over = self._resident_blocks + count - self._max_blocks
        if over > 0:
            self.reclaim(over)
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
            self._resident_blocks += count
        entry.host = None
        self._loader.drop(key)

    def _evict(self, key: PrefixKey, entry: _Entry) -> None:
        assert entry.blocks is not None
        for blocks in entry.blocks.values():
            self._ledger.release(blocks)
        self._resident_blocks -= entry.block_count
        self._observer.on_prefix_evicted(entry.block_count * self._bytes_per_block)
        entry.blocks, entry.block_count = None, 0
        if entry.waiters:
            self._ensure_loading(key, entry)
        self._drop_if_unused(key, entry)

    def _drop_if_unused(self, key: PrefixKey, entry: _Entry) -> None:
        if entry.waiters == 0 and entry.users == 0 and entry.blocks is None and not entry.pinned:
            del self._entries[key]
            self._loader.drop(key)  # begun or not: nobody waits for it any more
