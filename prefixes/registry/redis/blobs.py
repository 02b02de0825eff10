"""RedisBlobs: artifacts into Redis and out of it, in pieces.

Owns the pieces. While Redis takes or gives a piece, and writes it to its disk, everybody else waits: an artifact of
512 MiB in one command takes longer than a probe or a read may. The pieces of an artifact are put together under a key
of their own, which ends by itself, and take the artifact's place in one step, when all are there. Knows no task.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from prefixes.errors import RegistryUnavailable
from prefixes.registry.redis.errors import FAILURES, guarded
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.scripts import ADD_PIECE, PLACE
from prefixes.registry.redis.url import disconnect_idle

if TYPE_CHECKING:
    import redis
    from redis.cluster import RedisCluster

PIECE_BYTES: Final = 4 << 20
"""A disk that writes 10 MB a second takes 0.4 s for one; a probe waits for 1.5."""
PIECES_S: Final = 600
"""How long the pieces of an artifact stay after the last one, if their writer was killed."""


class RedisBlobs:
    """``reads`` and ``writes`` are clients of redis-py. Every method raises RegistryUnavailable."""

    def __init__(self, reads: redis.Redis | RedisCluster, writes: redis.Redis | RedisCluster) -> None:
        self._reads, self._writes = reads, writes
        self._add_piece, self._place = writes.register_script(ADD_PIECE), writes.register_script(PLACE)

    def read(self, tenant: str, version: str) -> bytes | None:
        """An artifact, None where it is not stored, or removed while it was read."""
        key = TenantKeys(tenant).blob(version)
        with guarded():
            pieces = [self._reads.getrange(key, 0, PIECE_BYTES - 1)]
            if len(pieces[0]) < PIECE_BYTES:
                return bytes(pieces[0]) or None
            size = self._reads.strlen(key)
            for begin in range(PIECE_BYTES, size, PIECE_BYTES):
                pieces.append(self._reads.getrange(key, begin, begin + PIECE_BYTES - 1))
        data = b"".join(pieces)
        return data if len(data) == size else None

    def write(self, tenant: str, version: str, data: bytes) -> None:
        """Store an artifact, whole or not at all.

        It goes over a new connection: an old one may lead to a master that hangs and was replaced.
        """
        keys = TenantKeys(tenant)
        with guarded():
            disconnect_idle(self._writes)
            if len(data) <= PIECE_BYTES:
                self._writes.set(keys.blob(version), data)
            else:
                self._write_pieces(keys.pieces(version, uuid.uuid4().hex), keys.blob(version), data)

    def _write_pieces(self, pieces: str, blob: str, data: bytes) -> None:
        try:
            for begin in range(0, len(data), PIECE_BYTES):
                piece = data[begin : begin + PIECE_BYTES]
                expected, got = begin + len(piece), self._add_piece(keys=[pieces], args=[begin, piece, PIECES_S])
                if got != expected:  # a master was replaced by one that had not heard of them all
                    raise _incomplete(expected, got)
            placed = self._place(keys=[pieces, blob], args=[len(data)])
            if placed != len(data):
                raise _incomplete(len(data), placed)
        except BaseException:
            with suppress(*FAILURES):
                self._writes.unlink(pieces)
            raise


def _incomplete(expected: int, got: int) -> RegistryUnavailable:
    return RegistryUnavailable(f"registry: expected {expected} bytes of the artifact in Redis, got {got}; try again")
