"""The numba kernel set: float32 and float64 on a CPU, weights and block tables read at memory bandwidth.

Owns the way from tensors to jobs of addresses; the loops are in ``numba_linear`` and ``numba_attention``, the threads
in ``numba_pool``. Knows no model.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba.np.numpy_support import from_dtype

from server.engine.kernels.base import Activation, KVCache, PagedBatch
from server.engine.kernels.numba import linear as linear_job
from server.engine.kernels.numba import norm as norm_job
from server.engine.kernels.numba.attention import QUERY_TILE, fill_tiles, write_blocks
from server.engine.kernels.numba.calibrate import calibrate
from server.engine.kernels.numba.jit import types
from server.engine.kernels.numba.math import GELU, GELU_NEW, NONE, RELU
from server.engine.kernels.numba.pool import ATTENTION, JOB_FIELDS, LINEAR, NORM, TOP, WorkerPool
from server.engine.kernels.numba.top import BLOCK
from server.engine.kernels.threads import available_cores
from server.engine.kernels.torch_reference import TorchKernels, activate

DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
ROW_BUCKETS = 11  # of calls with at most 1, 2, 4, ... 1024 rows; longer ones count among the last
CHUNK_ROWS = 64
CHUNK_OUTS = 48
SLAB_ROWS = 1024  # of activations that go through a layer together: more would not stay in the last cache
SITES_AT_ONCE = 2  # batches that the layers of one call alternate between
NORM_ROWS = 16  # of a layer norm, in a chunk
SHARED_BYTES = 1 << 18  # what a call reads at least for its threads to share it

_ACTIVATIONS = {"none": NONE, "gelu_new": GELU_NEW, "gelu": GELU, "relu": RELU}


class NumbaLinear:
    """``Linear`` with a bound weight: our kernel or torch's, by the number of rows.

    ``torch_buckets[b]`` says that calls of up to ``2**b`` rows go to torch; all False until ``calibrate`` measures.
    """

    def __init__(
        self, pool: WorkerPool, threads: int, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
    ) -> None:
        self.weight, self.bias, self.activation = weight, bias, activation
        self.torch_buckets = (False,) * ROW_BUCKETS
        self._pool, self._outs, self._count = pool, weight.shape[0], weight.shape[1]
        spread = -(-self._outs // (4 * threads * 12)) * 12  # four chunks for each thread, whole register tiles
        self._chunk_outs = max(12, min(CHUNK_OUTS, spread))
        self._weight_bytes = weight.numel() * weight.element_size()
        self._job = np.zeros(JOB_FIELDS, np.int64)
        self._job[:12] = (
            LINEAR, 0, 0, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), 0, 0, self._outs, self._count,
            self._chunk_outs, CHUNK_ROWS, _ACTIVATIONS[activation],
        )  # fmt: skip

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if self.torch_buckets[min((rows - 1).bit_length(), ROW_BUCKETS - 1)]:
            return self.by_torch(x)
        return self.by_numba(x)

    def by_torch(self, x: torch.Tensor) -> torch.Tensor:
        return activate(F.linear(x, self.weight, self.bias), self.activation)

    def by_numba(self, x: torch.Tensor) -> torch.Tensor:
        _check(x, self.weight.dtype, (x.shape[0], self._count), "activations")
        rows, strides = x.shape[0], x.stride()
        if strides[1] != 1:
            x = x.contiguous()
            strides = x.stride()
        out = torch.empty((rows, self._outs), dtype=x.dtype)
        if rows == 0:
            return out
        job, size = self._job.copy(), x.element_size()
        job[linear_job.X_STRIDE] = strides[0] * size
        for start in range(0, rows, SLAB_ROWS):
            count = min(SLAB_ROWS, rows - start)
            job[linear_job.X] = x.data_ptr() + start * strides[0] * size
            job[linear_job.OUT], job[linear_job.ROWS] = out.data_ptr() + start * self._outs * size, count
            chunks = -(-count // CHUNK_ROWS) * -(-self._outs // self._chunk_outs)
            self._pool.run(job, chunks, self._weight_bytes * -(-count // 4) >= SHARED_BYTES)
        return out


class NumbaNorm:
    """``Norm`` with bound weights."""

    def __init__(self, pool: WorkerPool, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self._weight, self._bias = weight, bias  # kept: the job has their addresses
        self._pool, self._width, self._eps = pool, weight.shape[0], np.array([eps], np.float64)
        self._job = np.zeros(JOB_FIELDS, np.int64)
        self._job[norm_job.KIND], self._job[norm_job.WIDTH] = NORM, self._width
        self._job[norm_job.WEIGHT], self._job[norm_job.BIAS] = weight.data_ptr(), bias.data_ptr()
        self._job[norm_job.CHUNK_ROWS], self._job[norm_job.EPS] = NORM_ROWS, self._eps.ctypes.data

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.shape[0]
        _check(x, self._weight.dtype, (rows, self._width), "activations")
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        job = self._job.copy()
        if residual is not None:
            _check(residual, self._weight.dtype, (rows, self._width), "residual")
            residual = residual.contiguous()
            job[norm_job.RESIDUAL] = residual.data_ptr()
        job[norm_job.X], job[norm_job.OUT], job[norm_job.ROWS] = x.data_ptr(), out.data_ptr(), rows
        self._pool.run(job, -(-rows // NORM_ROWS), out.numel() * out.element_size() >= SHARED_BYTES)
        return out


class NumbaKernels:
    """See ``base.Kernels``. Compiled when made (cached on disk), for one ``dtype``: float32 or float64."""

    name = "numba"

    def __init__(self, dtype: torch.dtype = torch.float32, threads: int | None = None) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"numba kernels: expected float32 or float64, got {dtype}")
        self.dtype, self.threads = dtype, threads or available_cores()
        self._pool = WorkerPool(self.threads, DTYPES[dtype])
        self._linears: weakref.WeakSet[NumbaLinear] = weakref.WeakSet()
        self._zero = DTYPES[dtype].type(0)
        self._plans: tuple[_Plan, ...] = ()  # of the batches that a call's layers go on asking for
        self.close = self._pool.close
        zero, i64 = from_dtype(DTYPES[dtype]), types.int64
        write_blocks.compile((zero, *[i64] * 14))
        fill_tiles.compile((types.int32[::1], types.int32[:, ::1]))

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation = "none"
    ) -> NumbaLinear:
        """As in ``base.Kernels``; the tensors are kept, not copied, unless they are not contiguous."""
        _check(weight, self.dtype, tuple(weight.shape), "weight")
        if bias is not None:
            _check(bias, self.dtype, (weight.shape[0],), "bias")
            bias = bias.contiguous()
        bound = NumbaLinear(self._pool, self.threads, weight.contiguous(), bias, activation)
        self._linears.add(bound)
        return bound

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> NumbaNorm:
        """As in ``base.Kernels``."""
        _check(weight, self.dtype, (weight.shape[0],), "weight")
        _check(bias, self.dtype, (weight.shape[0],), "bias")
        return NumbaNorm(self._pool, weight.contiguous(), bias.contiguous(), eps)

    def top_log_probs(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As in ``base.Kernels``."""
        rows, vocab = logits.shape
        if self.dtype != torch.float32:  # the pool is compiled for one type; float64 is there for tests
            return TorchKernels().top_log_probs(logits, count)
        _check(logits, torch.float32, (rows, vocab), "logits")
        if not 1 <= count <= vocab:
            raise ValueError(f"count: expected 1 to {vocab}, got {count}")
        logits = logits.contiguous()
        values, ids = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
        job = np.zeros(JOB_FIELDS, np.int64)
        sums = np.empty(self.threads * BLOCK, np.float32)
        job[:8] = (
            TOP, logits.data_ptr(), rows, vocab, count, values.data_ptr(), ids.data_ptr(), sums.ctypes.data,
        )  # fmt: skip
        self._pool.run(job, rows, logits.numel() * 4 >= SHARED_BYTES)
        return values, ids

    def warm_up(self, seconds: float = 2.0) -> None:
        """Measure our kernel against torch's for every shape bound so far, about ``seconds`` in all, and choose."""
        calibrate(list(self._linears), ROW_BUCKETS, seconds)

    def write_kv(
        self, cache: KVCache, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        tokens, size = slots.shape[0], self._zero.itemsize
        _, blocks, kv_heads, block_size, width = cache.keys.shape
        key = _rows(key, self.dtype, (tokens, kv_heads, width), "key")
        value = _rows(value, self.dtype, (tokens, kv_heads, width), "value")
        slots = _table(slots, torch.int64, "slots")
        (key_token, key_head, _), (value_token, value_head, _) = key.stride(), value.stride()
        written = write_blocks(
            self._zero, self._layer(cache.keys, layer), self._layer(cache.values, layer), slots.data_ptr(), tokens,
            key.data_ptr(), value.data_ptr(), key_token * size, key_head * size, value_token * size,
            value_head * size, blocks, kv_heads, block_size, width,
        )  # fmt: skip
        if not written:
            raise ValueError(f"slots: expected 0 to {blocks * block_size - 1}, got {slots.min()} to {slots.max()}")

    def paged_attention(self, query: torch.Tensor, cache: KVCache, layer: int, batch: PagedBatch) -> torch.Tensor:
        _, _, kv_heads, block_size, width = cache.keys.shape
        tokens, heads, size = query.shape[0], query.shape[1], self._zero.itemsize
        query = _rows(query, self.dtype, (tokens, heads, width), "query")
        out = torch.empty((tokens, heads, width), dtype=self.dtype)
        plan = next((plan for plan in self._plans if plan.batch is batch), None)
        if plan is None:
            plan = _Plan(batch, cache)
            self._plans = (*self._plans[1 - SITES_AT_ONCE :], plan)
        if plan.tokens != tokens:
            raise ValueError(f"query: expected {plan.tokens} tokens as the batch counts, got {tokens}")
        job, line = np.zeros(JOB_FIELDS, np.int64), plan.longest * size
        scratch = np.empty(self.threads * QUERY_TILE * plan.longest, self._zero.dtype)
        token_stride, head_stride, _ = query.stride()
        job[:20] = (
            ATTENTION, query.data_ptr(), token_stride * size, head_stride * size, self._layer(cache.keys, layer),
            self._layer(cache.values, layer), out.data_ptr(), heads, kv_heads, block_size, width,
            *plan.fields, scratch.ctypes.data, line,
        )  # fmt: skip
        read = batch.lengths.shape[0] * plan.longest * heads * width * size * 2
        self._pool.run(job, plan.tile_count * heads, read >= SHARED_BYTES)
        return out

    def _layer(self, pool: torch.Tensor, layer: int) -> int:
        """Address of a layer's blocks."""
        if pool.dtype != self.dtype or not pool.is_contiguous():
            raise ValueError(f"block pool: expected contiguous {self.dtype}, got {pool.dtype}, strides {pool.stride()}")
        return int(pool.data_ptr() + layer * pool.stride(0) * self._zero.itemsize)


class _Plan:
    """What the layers of one call share: its tables' addresses and its tiles of queries."""

    def __init__(self, batch: PagedBatch, cache: KVCache) -> None:
        self.batch = batch  # kept: the addresses below are into its tensors
        self._tables = _table(batch.tables, torch.int32, "tables")
        self._lengths = _table(batch.lengths, torch.int32, "lengths")
        self._counts, self.tokens = np.asarray(batch.counts, np.int32), sum(batch.counts)
        self._tiles = np.empty((sum(-(-count // QUERY_TILE) for count in batch.counts), 4), np.int32)
        self.tile_count = fill_tiles(self._counts, self._tiles)
        self.longest = max(1, int(self._lengths.sum(dim=1).max())) if batch.counts else 1
        self._check(cache)
        self.fields = (
            self._tiles.ctypes.data, self.tile_count, self._counts.ctypes.data, self._tables.data_ptr(),
            self._tables.shape[2], self._lengths.data_ptr(), int(batch.causal),
        )  # fmt: skip


    def _check(self, cache: KVCache) -> None:
        """The kernels follow these tables through memory: none may point outside."""
        tables, lengths, rows = self._tables.numpy(), self._lengths.numpy(), len(self.batch.counts)
        blocks, room = cache.keys.shape[1], tables.shape[2] * cache.block_size
        if tables.shape[:2] != (rows, 2) or lengths.shape != (rows, 2):
            raise ValueError(f"tables and lengths: expected {rows} rows, got {tables.shape} and {lengths.shape}")
        if tables.size and (tables.min() < 0 or tables.max() >= blocks):
            raise ValueError(f"block tables: expected blocks 0 to {blocks - 1}, got {tables.min()} to {tables.max()}")
        if lengths.size and (lengths.min() < 0 or lengths.max() > room):
            raise ValueError(f"lengths: expected 0 to {room} for these tables, got {lengths.min()} to {lengths.max()}")
        if self.batch.causal and (lengths[:, 1] < self._counts).any():
            raise ValueError(f"lengths: expected at least the call's own {self._counts}, got {lengths[:, 1]}")


def _check(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{what}: expected {dtype} {shape} on cpu, got {got}")


def _rows(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """``tensor`` itself where its elements of a head stand side by side (a view of a fused qkv does), else a copy."""
    _check(tensor, dtype, shape, what)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _table(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    _check(tensor, dtype, tuple(tensor.shape), what)
    return tensor.contiguous()
