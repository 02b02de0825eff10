"""Reuse of repeated prompts: which kept block holds the keys and values of which tokens. Torch-free.

Owns the mapping from a chain of tokens to blocks; the ledger owns the blocks. A chain's digest begins with the tenant,
the prefix version and the caller, so that content is never shared across tenants or versions.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from server.engine.blocks import BlockLedger
from server.engine.types import GenerationRequest


def chain_root(request: GenerationRequest) -> bytes:
    """The digest that every chain of this request begins with; bare rows have a root of their own."""
    prefix = f"{request.prefix.tenant}\n{request.prefix.version}" if request.prefix else "bare"
    return hashlib.blake2b(f"{request.tenant}\n{prefix}".encode(), digest_size=16).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a full block of ``tokens`` behind ``parent``."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PromptReuse:
    """Digest -> block, for full blocks whose keys and values have been computed."""

    def __init__(self, ledger: BlockLedger) -> None:
        self._ledger = ledger
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        ledger.on_forget(self._forget)

    def match(self, root: bytes, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """The longest known chain of full blocks that leaves at least one token to compute, and its digests.

        The blocks are shared with the caller, who releases them.
        """
        size, blocks, digests, parent = self._ledger.block_size, [], [], root
        for end in range(size, len(tokens), size):
            parent = chain(parent, tokens[end - size : end])
            block = self._blocks.get(parent)
            if block is None:
                break
            blocks.append(block)
            digests.append(parent)
        self._ledger.share(blocks)
        return blocks, digests

    def remember(self, digest: bytes, block: int) -> None:
        """Keep ``block`` under ``digest`` unless another block already holds the same content."""
        if digest not in self._blocks:
            self._blocks[digest] = block
            self._digests[block] = digest
            self._ledger.keep(block)

    def _forget(self, block: int) -> None:
        del self._blocks[self._digests.pop(block)]
