"""Resident prefixes: load, pin, claim, evict.

Owns which prefixes are in blocks, who uses them, and in which order idle ones yield. ``loader`` fetches and verifies
them, ``placement`` moves them in and out of blocks. The engine's thread alone calls it, except for the figures. Knows
no scheduler and no registry: it gets ``load``.

- A pin's blocks count from the moment of asking, whether it is loaded or not, until it is unpinned. A pin that cannot
  be loaded or written keeps its room, and the next request for it, or asking again, loads it anew.
- A group claims its prefix when it is first admitted, until it ends. A claimed prefix that must leave its blocks is
  copied to host memory, so that what was admitted never needs the registry again. Claims have a bound of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prefixes.errors import EngineFailure, PrefixdError
from prefixes.spec import PrefixSpec
from server.engine.memory.blocks import BlockLedger
from server.engine.observer import EngineObserver
from server.engine.prefixes.entry import Entry, LoadStatus, SiteBlocks
from server.engine.prefixes.loader import PrefixLoader
from server.engine.prefixes.placement import Placement
from server.engine.prefixes.sets import PrefixSets
from server.engine.types import GenerationRequest, PrefixKey

if TYPE_CHECKING:
    from prefixes.artifact import Prefix

log = logging.getLogger(__name__)


class PrefixStore(PrefixSets):
    """Bounded by bytes. Evicts what nobody uses or pins, of an owner the least recently used first."""

    def __init__(
        self,
        ledger: BlockLedger,
        load: Callable[[PrefixKey], Prefix],
        placement: Placement,
        *,
        bytes_per_block: int,
        max_bytes: int | None,
        max_claimed_bytes: int | None,
        workers: int,
        max_staged_bytes: int,
        observer: EngineObserver,
        wake: Callable[[], None],
    ) -> None:
        super().__init__(
            ledger, bytes_per_block=bytes_per_block, max_bytes=max_bytes, max_claimed_bytes=max_claimed_bytes
        )
        self._placement, self._observer = placement, observer
        self._loader = PrefixLoader(
            load, workers=workers, max_staged_bytes=max_staged_bytes, observer=observer, wake=wake
        )
        ledger.set_reclaimer(self)

    # --- waiting groups ---

    def want(self, key: PrefixKey, spec: PrefixSpec) -> None:
        """A group waits for ``key``: load it unless it is resident or loaded."""
        entry = self._entry(key, spec)
        entry.waiters += 1
        self._ensure_loading(key, entry)

    def unwant(self, key: PrefixKey) -> None:
        """A group no longer waits for ``key``."""
        entry = self._entries[key]
        entry.waiters -= 1
        if entry.pinned and entry.waiters == 0 and entry.at_loader:
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

    def reclaim(self, tenant: str) -> None:
        """Evict ``tenant``'s least recently used idle prefix; the ledger asks."""
        self._evict(*next(iter(self._idle_of[tenant].entries.items())))

    # --- running groups ---

    def try_acquire(self, key: PrefixKey, extra_blocks: int) -> SiteBlocks | None:
        """Hold ``key``'s blocks for a group that needs ``extra_blocks`` more of its own; None if there is no room.

        A READY key that is not in blocks moves into them; idle prefixes may yield to it. If it cannot be written, it
        becomes FAILED.
        """
        entry = self._entries[key]
        entry.users += 1
        self._file(key, entry)  # no longer idle: making room must not evict it
        if not entry.resident and self._fits(key, entry, extra_blocks):
            self._make_resident(key, entry)
        if entry.resident and self._fits(key, entry, extra_blocks):
            return entry.blocks
        self.release(key)
        return None

    def may_claim(self, key: PrefixKey) -> bool:
        """Whether a group may claim ``key``, a wanted one; else it waits until claims of other prefixes end."""
        entry = self._entries[key]
        return entry.claims > 0 or self._claimed.blocks + entry.block_count <= self._max_claimed

    def claim(self, key: PrefixKey) -> None:
        """A group that was just admitted needs ``key`` until it ends, in blocks or not."""
        entry = self._entries[key]
        entry.claims += 1
        self._claimed.put(key, entry, True)

    def unclaim(self, key: PrefixKey) -> None:
        """A group that claimed ``key`` has ended. The last one's copy goes; who waits for it still loads it."""
        entry = self._entries[key]
        entry.claims -= 1
        self._claimed.put(key, entry, entry.claims > 0)
        if entry.copy_bytes and entry.claims == 0:
            self._drop_copy(entry)
            self._file(key, entry)
            if entry.waiters or entry.pinned:
                self._ensure_loading(key, entry)
        self._drop_if_unused(key, entry)

    def release(self, key: PrefixKey) -> None:
        """A group no longer uses ``key``'s blocks; they stay resident until the room is needed."""
        entry = self._entries[key]
        entry.users -= 1
        self._file(key, entry)

    # --- pins ---

    def reserve(self, key: PrefixKey, spec: PrefixSpec) -> None:
        """Count ``key`` as pinned. Somebody must have seen that there is room; ``pin`` loads it."""
        entry = self._entry(key, spec)
        if not entry.pinned:
            entry.pinned = True
            self._pinned.put(key, entry, True)
            self._file(key, entry)

    def pin(self, key: PrefixKey, spec: PrefixSpec) -> None:
        """Reserve and load ``key``. It moves into blocks at its first use, or when ``settle`` finds room."""
        self.reserve(key, spec)
        self._ensure_loading(key, self._entries[key])

    def unpin(self, key: PrefixKey) -> None:
        """Let ``key`` be evicted again."""
        entry = self._entries.get(key)
        if entry:
            entry.pinned = False
            self._pinned.put(key, entry, False)
            self._file(key, entry)
            self._drop_if_unused(key, entry)

    # --- loads ---

    @property
    def has_news(self) -> bool:
        """Whether ``settle`` would do anything."""
        return self._loader.has_ended or any(self._fits(key, entry, 0) for key, entry in self._unsettled.items())

    def settle(self) -> list[PrefixKey]:
        """Take in loads that have ended, and move loaded pins into blocks where there is room.

        Returns the keys whose loads have ended and that are still wanted or pinned: each is READY or FAILED now. So are
        pins that could not be written.
        """
        ended = [key for key in self._loader.take_ended() if self._take_in(key)]
        for key, entry in list(self._unsettled.items()):
            if self._fits(key, entry, 0):
                self._make_resident(key, entry)
                if not entry.resident and key not in ended:
                    ended.append(key)
        return ended

    @property
    def staged_bytes(self) -> int:
        """Bytes of prefixes that are loaded and not in blocks, in host memory."""
        return self._loader.staged_bytes

    def recount(
        self,
        using: Iterable[GenerationRequest],
        waiting: Iterable[GenerationRequest],
        claiming: Iterable[GenerationRequest],
    ) -> None:
        """After a fault between two changes: these requests use, wait for and claim their prefixes, and no others.

        What is in blocks, staged or copied stays; a load whose end may have been lost begins anew.
        """
        for entry in self._entries.values():
            entry.users = entry.waiters = entry.claims = 0
        for entry in self._entries_of(using):
            entry.users += 1
        for entry in self._entries_of(waiting):
            entry.waiters += 1
        for entry in self._entries_of(claiming):
            entry.claims += 1
        for key, entry in list(self._entries.items()):
            if entry.resident or (entry.copy_bytes and not entry.claims):
                entry.host, entry.copy_bytes = None, 0
            if entry.host is None:
                self._loader.drop(key)
                entry.loading, entry.error = False, None
                if entry.waiters or entry.pinned:
                    self._ensure_loading(key, entry)
        self._file_all()
        for key, entry in list(self._entries.items()):
            self._drop_if_unused(key, entry)

    def close(self) -> None:
        """Stop the loaders; loads under way are abandoned."""
        self._loader.close()

    # --- inside ---

    def _ensure_loading(self, key: PrefixKey, entry: Entry) -> None:
        if entry.resident or entry.copy_bytes:
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
        if not isinstance(outcome, PrefixdError) and (got := self.block_count(outcome.spec)) != entry.block_count:
            outcome = EngineFailure(f"prefix: expected {entry.block_count} blocks, as its record says, got {got}")
        if isinstance(outcome, PrefixdError):
            entry.error = outcome
            self._loader.drop(key)
            if entry.pinned:
                facts = {"tenant": key.tenant, "version": key.version, "error": outcome.message}
                log.warning("a pinned prefix could not be loaded; the next request for it tries again",
                            extra={"facts": facts})  # fmt: skip
        else:
            entry.host = outcome
            self._file(key, entry)
        return True

    def _make_resident(self, key: PrefixKey, entry: Entry) -> None:
        assert entry.host is not None
        self._share_out(key, entry, counts=not entry.pinned)  # before room is made for it
        while self._resident.blocks + entry.block_count > self._max_blocks:
            self.reclaim(self._ledger.shares.first_to_yield(self._idle_of))
        try:
            entry.blocks = self._placement.place(entry.host)
        except Exception as error:
            facts = {"tenant": key.tenant, "version": key.version}
            log.exception("a prefix could not be written to its blocks", extra={"facts": facts})
            entry.error = EngineFailure(f"prefix: writing failed with {type(error).__name__}")
        self._drop_copy(entry)
        self._file(key, entry)
        self._loader.drop(key)

    def _evict(self, key: PrefixKey, entry: Entry) -> None:
        assert entry.blocks is not None
        if entry.claims:
            self._copy(key, entry)
        blocks, entry.blocks = entry.blocks, None
        self._file(key, entry)
        self._placement.release(blocks)
        self._observer.on_prefix_evicted(entry.block_count * self._bytes_per_block)
        if entry.waiters:
            self._ensure_loading(key, entry)
        self._drop_if_unused(key, entry)

    def _copy(self, key: PrefixKey, entry: Entry) -> None:
        """Read a claimed prefix back from the blocks that it must leave. Where that fails it is loaded again."""
        assert entry.blocks is not None
        try:
            entry.host, entry.copy_bytes = self._placement.read(entry.spec, entry.blocks)
        except Exception:
            facts = {"tenant": key.tenant, "version": key.version}
            log.exception("a prefix could not be copied from its blocks; it is loaded again", extra={"facts": facts})
        self._copy_bytes += entry.copy_bytes

    def _drop_copy(self, entry: Entry) -> None:
        self._copy_bytes -= entry.copy_bytes
        entry.host, entry.copy_bytes = None, 0

    def _drop_if_unused(self, key: PrefixKey, entry: Entry) -> None:
        if entry.unused:
            del self._entries[key]
            self._loader.drop(key)  # also a load that has begun
