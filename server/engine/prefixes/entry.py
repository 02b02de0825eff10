"""The record of one prefix, and sets of records with the sum of their blocks. Torch-free.

Owns these two data structures; ``store`` owns what happens to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from prefixes.errors import PrefixdError
from prefixes.spec import PrefixSpec, Site
from server.engine.types import PrefixKey

if TYPE_CHECKING:
    from prefixes.artifact import Prefix

SiteBlocks = Mapping[Site, tuple[int, ...]]


class LoadStatus(Enum):
    """LOADING: queued or being loaded. READY: loaded, in blocks or not yet. FAILED: not loaded or not written."""

    LOADING = auto()
    READY = auto()
    FAILED = auto()


@dataclass
class Entry:
    """One prefix that is wanted, used, claimed, pinned, or still in blocks.

    ``block_count`` is what it takes in blocks, by its ``spec``. Both are known before it is loaded.
    """

    spec: PrefixSpec
    block_count: int
    loading: bool = False
    host: Prefix | None = None  # not in blocks: loaded (staged), or read back from them (a copy)
    copy_bytes: int = 0  # of ``host`` if that is a copy
    error: PrefixdError | None = None
    blocks: SiteBlocks | None = None
    waiters: int = 0  # waiting groups: they keep the version, not its blocks
    users: int = 0  # running groups: their blocks stay
    claims: int = 0  # groups that were admitted and have not ended: it may leave the blocks, not this machine
    pinned: bool = False

    @property
    def status(self) -> LoadStatus:
        if self.resident or self.host is not None:
            return LoadStatus.READY
        return LoadStatus.FAILED if self.error else LoadStatus.LOADING

    @property
    def resident(self) -> bool:
        return self.blocks is not None

    @property
    def at_loader(self) -> bool:
        """Whether the loader has it: queued, being loaded, or staged."""
        return self.loading or (self.host is not None and not self.copy_bytes)

    @property
    def idle(self) -> bool:
        """Whether its blocks may be taken for something else."""
        return self.resident and self.users == 0 and not self.pinned

    @property
    def shared_out(self) -> bool:
        """Whether its blocks count in its owner's share."""
        return self.resident and not self.pinned

    @property
    def unused(self) -> bool:
        """Whether the entry can be forgotten."""
        return not (self.waiters or self.users or self.claims or self.resident or self.pinned)


class EntrySet:
    """Some of the entries, in the order in which they joined, and the sum of their blocks.

    An entry's ``block_count`` must not change while it belongs. ``entries`` is a plain dict because other threads
    snapshot it: copying an OrderedDict calls the keys' hashes, so the engine's thread could change it half-way.
    """

    def __init__(self) -> None:
        self.entries: dict[PrefixKey, Entry] = {}
        self.blocks = 0

    def put(self, key: PrefixKey, entry: Entry, belongs: bool) -> int:
        """Add ``entry``, as the last to join, if it ``belongs``; else remove it. Returns the blocks that this adds."""
        before = self.blocks
        if self.entries.pop(key, None):
            self.blocks -= entry.block_count
        if belongs:
            self.entries[key] = entry
            self.blocks += entry.block_count
        return self.blocks - before
