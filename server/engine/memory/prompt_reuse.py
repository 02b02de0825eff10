"""Reuse of repeated prompts: which kept block holds the keys and values of which tokens. Torch-free.

Owns the mapping from a chain of tokens to blocks; the ledger owns the blocks. A chain's digest begins with the caller,
the prefix's owner and its version, so content is never shared across callers, owners or versions.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from server.engine.memory.blocks import BlockLedger
from server.engine.types import GenerationRequest


def chain_root(request: GenerationRequest, encoder_ids: Sequence[int] = ()) -> bytes:
    """The digest that every chain of this request begins with; bare rows have a root of their own.

    What a decoder computes depends on the whole input of its encoder, so that input is part of the root.
    """
    prefix = f"{request.prefix.tenant}\n{request.prefix.version}" if request.prefix else "bare"
    identity = f"{request.caller}\n{prefix}\n".encode() + array("q", encoder_ids).tobytes()
    return hashlib.blake2b(identity, digest_size=16).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a full block of ``tokens`` behind ``parent``."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def _of_input(root: bytes, index: int) -> bytes:
    return hashlib.blake2b(root + b"input" + index.to_bytes(4), digest_size=16).digest()


class PromptReuse:
    """Digest -> block, for full blocks of a decoder's tokens, and for the blocks of whole encoded inputs."""

    def __init__(self, ledger: BlockLedger) -> None:
        self._ledger = ledger
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        ledger.on_forget(self._forget)

    def match(self, root: bytes, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """The longest known chain of full blocks that leaves at least one token to compute, and its digests.

        The caller shares the blocks and must release them.
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

    def match_input(self, root: bytes, count: int) -> list[int]:
        """The ``count`` blocks of ``root``'s encoded input, shared with the caller; [] unless all are there."""
        blocks = [self._blocks.get(_of_input(root, index)) for index in range(count)]
        found = [block for block in blocks if block is not None]
        if len(found) < count:
            return []
        self._ledger.share(found)
        return found

    def remember_input(self, root: bytes, blocks: Sequence[int], caller: str) -> None:
        """Keep the blocks of an input of ``caller`` that has been encoded."""
        for index, block in enumerate(blocks):
            self.remember(_of_input(root, index), block, caller)

    def remember(self, digest: bytes, block: int, caller: str) -> None:
        """Keep ``block`` under ``digest`` for ``caller`` unless another block already holds the same content."""
        if digest not in self._blocks:
            self._blocks[digest] = block
            self._digests[block] = digest
            self._ledger.keep(block, caller)

    def clear(self) -> None:
        """Know no block any more; the ledger must forget them as well."""
        self._blocks.clear()
        self._digests.clear()

    def _forget(self, block: int) -> None:
        del self._blocks[self._digests.pop(block)]
