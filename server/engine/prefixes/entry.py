"""What is known of one prefix, and sums over many that cost nothing to read. Torch-free.

Owns the two forms; ``store`` owns what happens to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from prefixes.errors import PrefixdError
from prefixes.spec import Site
from server.engine.types import PrefixKey

if TYPE_CHECKING:
    from prefixes.artifact import Prefix

SiteBlocks = Mapping[Site, tuple[int, ...]]


class LoadStatus(Enum):
    """LOADING or in line for it, READY to take blocks (or in them already), FAILED for those who waited."""

    LOADING = auto()
    READY = auto()
    FAILED = auto()


@dataclass
class Entry:
    """One prefix that somebody wants, uses or pins, or that is in blocks still."""

    loading: bool = False
    host: Prefix | None = None  # loaded, not in blocks: staged
    error: PrefixdError | None = None
    blocks: SiteBlocks | None = None
    block_count: int = 0
    waiters: int = 0  # waiting rows: they pin the version, not its blocks
    users: int = 0  # running groups: their blocks stay
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
    def idle(self) -> bool:
        """Whether its blocks may be taken for something else."""
        return self.resident and self.users == 0 and not self.pinned

    @property
    def unused(self) -> bool:
        """Whether nothing is left to know of it."""
        return self.waiters == 0 and self.users == 0 and not self.resident and not self.pinned


class EntrySet:
    """Some of the entries, in the order in which they joined, and the sum of their blocks.

    ``block_count`` of an entry must not change while it belongs. A plain dict: other threads snapshot it, and copying
    an OrderedDict calls back into the keys' hashes, so that the engine's thread could change it half-way.
    """

    def __init__(self) -> None:
        self.entries: dict[PrefixKey, Entry] = {}
        self.blocks = 0

    def put(self, key: PrefixKey, entry: Entry, belongs: bool) -> None:
        """Let ``entry`` belong, as the last to join, or not."""
        if self.entries.pop(key, None):
            self.blocks -= entry.block_count
        if belongs:
            self.entries[key] = entry
            self.blocks += entry.block_count
