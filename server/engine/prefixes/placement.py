"""A prefix's blocks: taken, written, read back, given back.

Owns how a prefix's sites share out its blocks. Knows neither who uses a prefix nor why it comes or goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prefixes.spec import PrefixSpec, Site
from server.engine.memory.blocks import BlockLedger
from server.engine.prefixes.entry import SiteBlocks

if TYPE_CHECKING:
    from prefixes.artifact import Prefix


class Placement:
    """Prefixes in the blocks of one ledger. ``write`` and ``read`` move their keys and values."""

    def __init__(
        self,
        ledger: BlockLedger,
        write: Callable[[Prefix, SiteBlocks], None],
        read: Callable[[PrefixSpec, SiteBlocks], Prefix],
    ) -> None:
        self._ledger, self._write, self._read = ledger, write, read

    def place(self, prefix: Prefix) -> SiteBlocks:
        """Take blocks and write ``prefix`` into them. Takes none if it cannot be written; raises what ``write`` does.

        There must be room.
        """
        taken: dict[Site, tuple[int, ...]] = {}
        try:
            for site, sited in prefix.spec.sites.items():
                taken[site] = tuple(self._ledger.allocate(self._ledger.blocks_for(sited.length)))
            self._write(prefix, taken)
        except Exception:
            self.release(taken)
            raise
        return taken

    def read(self, spec: PrefixSpec, blocks: SiteBlocks) -> tuple[Prefix, int]:
        """A copy of what ``blocks`` hold, in host memory, and its bytes. Writing it back gives the same bits."""
        prefix = self._read(spec, blocks)
        return prefix, sum(tensor.nbytes for tensor in prefix.tensors.values())

    def release(self, blocks: SiteBlocks) -> None:
        """Give the blocks back."""
        for taken in blocks.values():
            self._ledger.release(taken)
