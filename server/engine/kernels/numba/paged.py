"""What the layers of one call share: tables, checked once, tiles of queries, and a job that each layer completes.

Owns the way from a batch's tensors to the addresses that the loops of ``attention`` follow; knows no model.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from server.engine.kernels.base import KVCache, PagedBatch, Scores
from server.engine.kernels.numba import attention as attention_job
from server.engine.kernels.numba.attention import QUERY_TILE, fill_tiles, write_blocks
from server.engine.kernels.numba.checks import check_pool, check_tensor, checked_heads, checked_table
from server.engine.kernels.numba.jobs import ATTENTION, new_job, share_out
from server.engine.kernels.numba.pool import WorkerPool


class NumbaBatch:
    """See ``base.PreparedBatch``. Checks all tables when it is made: the kernels follow them through memory."""

    def __init__(
        self, pool: WorkerPool, dtype: torch.dtype, cache: KVCache, batch: PagedBatch, scores: Scores | None
    ) -> None:
        check_pool(cache.keys, dtype)
        check_pool(cache.values, dtype)
        self._pool, self._dtype, self._cache, self._size = pool, dtype, cache, dtype.itemsize
        self._layer_bytes = cache.keys.stride(0) * self._size
        self._slots = checked_table(batch.slots, torch.int64, "slots")
        self._tables = checked_table(batch.tables, torch.int32, "tables")
        self._lengths = checked_table(batch.lengths, torch.int32, "lengths")
        self._unplaced = checked_table(batch.unplaced, torch.int32, "unplaced")
        self._counts, self._tokens = np.asarray(batch.counts, np.int32), sum(batch.counts)
        self._check(batch.causal)

        tiles = np.empty((sum(-(-count // QUERY_TILE) for count in batch.counts), 4), np.int32)
        self._tile_count = fill_tiles(self._counts, tiles)
        self._longest = max(1, int(self._lengths.sum(dim=1).max())) if batch.counts else 1  # keys of a row
        self._scratch = np.empty(0, pool.zero.dtype)  # made when the first layer says how many heads it has
        self._tiles = tiles  # kept: the job has its address
        _, _, self._kv_heads, self._block_size, self._width = cache.keys.shape
        self._jobs = new_job(ATTENTION)
        self._job = self._jobs[0]
        self._job[attention_job.KV_HEADS : attention_job.CAUSAL + 1] = (
            self._kv_heads, self._block_size, self._width, tiles.ctypes.data, self._tile_count,
            self._counts.ctypes.data, self._tables.data_ptr(), self._tables.shape[2], self._lengths.data_ptr(),
            int(batch.causal),
        )  # fmt: skip
        self._job[attention_job.SCRATCH_ROW] = self._longest * self._size
        self._set_scores(scores)
        self._bytes_per_head = len(batch.counts) * self._longest * self._width * self._size * 2

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """As in ``base.PreparedBatch``. Raises ValueError for tensors of another shape or type."""
        tokens, size = self._slots.shape[0], self._size
        key = checked_heads(key, self._dtype, (tokens, self._kv_heads, self._width), "key")
        value = checked_heads(value, self._dtype, (tokens, self._kv_heads, self._width), "value")
        (key_token, key_head, _), (value_token, value_head, _) = key.stride(), value.stride()
        write_blocks(
            self._pool.zero, *self._addresses(layer), self._slots.data_ptr(), tokens, key.data_ptr(),
            value.data_ptr(), key_token * size, key_head * size, value_token * size, value_head * size,
            self._kv_heads, self._block_size, self._width,
        )  # fmt: skip

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """As in ``base.PreparedBatch``. Raises ValueError for a tensor of another shape or type."""
        tokens, heads, _ = query.shape
        if tokens != self._tokens:
            raise ValueError(f"query: expected {self._tokens} tokens as the batch counts, got {tokens}")
        if heads % self._kv_heads:
            raise ValueError(f"query: expected a multiple of {self._kv_heads} heads, got {heads}")
        if self._bias is not None and heads != self._bias.shape[0]:
            raise ValueError(f"query: expected {self._bias.shape[0]} heads as the bias has, got {heads}")
        query = checked_heads(query, self._dtype, (tokens, heads, self._width), "query")
        self._provide_scratch(heads // self._kv_heads)
        out = torch.empty((tokens, heads, self._width), dtype=self._dtype)
        token_stride, head_stride, _ = query.stride()
        self._job[attention_job.QUERY : attention_job.HEADS + 1] = (
            query.data_ptr(), token_stride * self._size, head_stride * self._size, *self._addresses(layer),
            out.data_ptr(), heads,
        )  # fmt: skip
        share_out(self._job, self._tile_count * self._kv_heads, self._bytes_per_head * self._kv_heads)
        self._pool.run(self._jobs)
        return out

    def _set_scores(self, scores: Scores | None) -> None:
        scale = 1 / math.sqrt(self._width) if scores is None else scores.scale
        self._scale, self._bias = np.array([scale], np.float64), None if scores is None else scores.bias
        self._job[attention_job.SCALE] = self._scale.ctypes.data
        if self._bias is not None:
            check_tensor(self._bias, self._dtype, (self._bias.shape[0], self._bias.shape[1] | 1), "bias")
            self._bias = self._bias.contiguous()
            self._job[attention_job.BIAS : attention_job.UNPLACED + 1] = (
                self._bias.data_ptr(), self._bias.shape[1] // 2, self._unplaced.data_ptr(),
            )  # fmt: skip

    def _provide_scratch(self, group: int) -> None:
        """Each thread's lines of scores, for ``group`` query heads to a key head."""
        needed = self._pool.threads * QUERY_TILE * group * self._longest
        if self._scratch.size < needed:
            self._scratch = np.empty(needed, self._pool.zero.dtype)
            self._job[attention_job.SCRATCH] = self._scratch.ctypes.data

    def _addresses(self, layer: int) -> tuple[int, int]:
        """Addresses of a layer's keys and values."""
        offset = layer * self._layer_bytes
        return self._cache.keys.data_ptr() + offset, self._cache.values.data_ptr() + offset

    def _check(self, causal: bool) -> None:
        """Raise ValueError if a table points outside of the pool."""
        tables, lengths, slots = self._tables.numpy(), self._lengths.numpy(), self._slots.numpy()
        unplaced = self._unplaced.numpy()
        rows, blocks, size = len(self._counts), self._cache.keys.shape[1], self._cache.block_size
        if tables.shape[:2] != (rows, 2) or lengths.shape != (rows, 2):
            raise ValueError(f"tables and lengths: expected {rows} rows, got {tables.shape} and {lengths.shape}")
        if tables.size and (tables.min() < 0 or tables.max() >= blocks):
            raise ValueError(f"block tables: expected blocks 0 to {blocks - 1}, got {tables.min()} to {tables.max()}")
        room = tables.shape[2] * size
        if lengths.size and (lengths.min() < 0 or lengths.max() > room):
            raise ValueError(f"lengths: expected 0 to {room} for these tables, got {lengths.min()} to {lengths.max()}")
        if unplaced.shape != (rows,) or (unplaced < 0).any() or (unplaced > lengths[:, 0]).any():
            raise ValueError(f"unplaced: expected 0 to {lengths[:, 0]} keys of a prefix, got {unplaced}")
        if causal and (lengths[:, 1] < self._counts).any():
            raise ValueError(f"lengths: expected at least the call's own {self._counts}, got {lengths[:, 1]}")
        if slots.size and (slots.min() < 0 or slots.max() >= blocks * size):
            raise ValueError(f"slots: expected 0 to {blocks * size - 1}, got {slots.min()} to {slots.max()}")
