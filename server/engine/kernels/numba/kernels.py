"""The numba kernel set: float32 and float64 on a CPU, weights and block tables read at memory bandwidth.

Owns the layers with bound weights, and what a set offers. ``paged`` prepares batches for attention; the loops are in
``linear``, ``norm``, ``attention`` and ``top``, the threads in ``pool``. Knows no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba.np.numpy_support import from_dtype

from server.engine.kernels.base import Activation, Embedding, KVCache, Linear, PagedBatch, Scores
from server.engine.kernels.numba import linear as linear_job
from server.engine.kernels.numba import norm as norm_job
from server.engine.kernels.numba import rows as rows_job
from server.engine.kernels.numba.attention import fill_tiles, write_blocks
from server.engine.kernels.numba.checks import check_tensor, checked_heads, checked_rows
from server.engine.kernels.numba.jit import types
from server.engine.kernels.numba.math import GELU, GELU_NEW, NONE, RELU, SILU
from server.engine.kernels.numba.paged import NumbaBatch
from server.engine.kernels.numba.panels import Panels
from server.engine.kernels.numba.pool import GATE, JOB_FIELDS, LINEAR, NORM, ROTATE, SHARED_BYTES, TOP, WorkerPool
from server.engine.kernels.numba.tiles import PANEL_BYTES
from server.engine.kernels.numba.top import BLOCK
from server.engine.kernels.threads import available_cores

DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
CHUNK_ROWS = 72  # whole register tiles
CHUNK_BYTES = 192 << 10  # of weights: beside the activations of a chunk's rows they stay in a second-level cache
CHUNKS_PER_THREAD = 4
SLAB_ROWS = 1024  # activation rows that go through a layer together: more would not stay in the last-level cache
NORM_ROWS = 16  # rows in a chunk of a norm, a gate or a rotation

_ACTIVATIONS = {"none": NONE, "gelu_new": GELU_NEW, "gelu": GELU, "relu": RELU, "silu": SILU}


class NumbaLinear:
    """``Linear`` with a bound weight, kept in panels."""

    def __init__(
        self, pool: WorkerPool, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
    ) -> None:
        self._panels, self._bias = Panels.of(weight), bias
        self._pool, self._dtype, (self.outs, self._count) = pool, weight.dtype, weight.shape
        panels, _, lanes = self._panels.packed.shape
        self._weight_bytes, panel_bytes = panels * self._count * PANEL_BYTES, max(self._count * PANEL_BYTES, 1)
        spread = max(1, -(-panels // (CHUNKS_PER_THREAD * pool.threads)))
        self._chunk_panels = -(-min(spread, max(CHUNK_BYTES // panel_bytes, 1)) // 4) * 4  # as few rows take them
        self._chunks, self._padded = -(-panels // self._chunk_panels), panels * lanes
        self._job = np.zeros(JOB_FIELDS, np.int64)
        self._job[linear_job.KIND], self._job[linear_job.ACTIVATION] = LINEAR, _ACTIVATIONS[activation]
        self._job[linear_job.PANELS] = self._panels.packed.data_ptr()
        self._job[linear_job.BIAS] = 0 if bias is None else bias.data_ptr()
        self._job[linear_job.OUT_STRIDE] = self._padded * weight.element_size()
        self._job[linear_job.OUTS : linear_job.CHUNK_ROWS + 1] = (
            self.outs, self._count, self._chunk_panels, CHUNK_ROWS,
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        rows, size = x.shape[0], x.element_size()
        x = checked_rows(x, self._dtype, (rows, self._count), "activations")
        out = torch.empty((rows, self._padded), dtype=x.dtype)
        job, x_stride, residual_stride = self._job.copy(), x.stride(0) * size, 0
        if residual is not None:
            residual = checked_rows(residual, self._dtype, (rows, self.outs), "residual")
            residual_stride = residual.stride(0) * size
        job[linear_job.X_STRIDE], job[linear_job.RESIDUAL_STRIDE] = x_stride, residual_stride
        for start in range(0, rows, SLAB_ROWS):
            count = min(SLAB_ROWS, rows - start)
            job[linear_job.X] = x.data_ptr() + start * x_stride
            job[linear_job.RESIDUAL] = 0 if residual is None else residual.data_ptr() + start * residual_stride
            job[linear_job.OUT], job[linear_job.ROWS] = out.data_ptr() + start * self._padded * size, count
            chunks = -(-count // CHUNK_ROWS) * self._chunks
            self._pool.run(job, chunks, self._weight_bytes * -(-count // 4) >= SHARED_BYTES)
        return out[:, : self.outs]

    def rows_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """The weight's rows of ``outputs (n,)``: ``(n, in)``."""
        packed = self._panels.packed
        return packed[outputs // packed.shape[2], :, outputs % packed.shape[2]]


class NumbaGated:
    """A linear layer whose outputs are a gate and what it lets through; the result is a view of both."""

    def __init__(self, pool: WorkerPool, linear: NumbaLinear, activation: Activation) -> None:
        self._pool, self._linear, self._width = pool, linear, linear.outs // 2
        self._job = np.zeros(JOB_FIELDS, np.int64)
        self._job[rows_job.KIND], self._job[rows_job.WIDTH] = GATE, self._width
        self._job[rows_job.CHUNK_ROWS], self._job[rows_job.ACTIVATION] = NORM_ROWS, _ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both, job = self._linear(x), self._job.copy()
        size, rows = both.element_size(), both.shape[0]
        job[rows_job.X], job[rows_job.ROW_STRIDE], job[rows_job.ROWS] = both.data_ptr(), both.stride(0) * size, rows
        self._pool.run(job, -(-rows // NORM_ROWS), both.numel() * size >= SHARED_BYTES)
        return both[:, : self._width]


class NumbaNorm:
    """``Norm`` with bound weights; without a bias the root mean square's."""

    def __init__(self, pool: WorkerPool, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self._weight, self._bias = weight, bias  # kept: the job has their addresses
        self._pool, self._width, self._eps = pool, weight.shape[0], np.array([eps], np.float64)
        self._job = np.zeros(JOB_FIELDS, np.int64)
        self._job[norm_job.KIND], self._job[norm_job.WIDTH] = NORM, self._width
        self._job[norm_job.WEIGHT], self._job[norm_job.BIAS] = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        self._job[norm_job.CHUNK_ROWS], self._job[norm_job.EPS] = NORM_ROWS, self._eps.ctypes.data

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.shape[0]
        check_tensor(x, self._weight.dtype, (rows, self._width), "activations")
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        job = self._job.copy()
        if residual is not None:
            check_tensor(residual, self._weight.dtype, (rows, self._width), "residual")
            residual = residual.contiguous()
            job[norm_job.RESIDUAL] = residual.data_ptr()
        job[norm_job.X], job[norm_job.OUT], job[norm_job.ROWS] = x.data_ptr(), out.data_ptr(), rows
        self._pool.run(job, -(-rows // NORM_ROWS), out.numel() * out.element_size() >= SHARED_BYTES)
        return out


class NumbaKernels:
    """See ``base.Kernels``. Compiled when made (cached on disk), for one ``dtype``: float32 or float64.

    With ``take_weights`` the memory of a linear layer's weight is given up once it is packed.
    """

    name = "numba"

    def __init__(
        self, dtype: torch.dtype = torch.float32, threads: int | None = None, *, take_weights: bool = False
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"numba kernels: expected float32 or float64, got {dtype}")
        self.dtype, self._pool = dtype, WorkerPool(threads or available_cores(), DTYPES[dtype])
        self._take_weights, self.close = take_weights, self._pool.close
        zero, i64 = from_dtype(DTYPES[dtype]), types.int64
        write_blocks.compile((zero, *[i64] * 13))
        fill_tiles.compile((types.int32[::1], types.int32[:, ::1]))

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation = "none"
    ) -> NumbaLinear:
        """As in ``base.Kernels``; keeps the bias, and a copy of the weight."""
        check_tensor(weight, self.dtype, tuple(weight.shape), "weight")
        if bias is not None:
            check_tensor(bias, self.dtype, (weight.shape[0],), "bias")
            bias = bias.contiguous()
        bound, storage = NumbaLinear(self._pool, weight, bias, activation), weight.untyped_storage()
        if self._take_weights and storage.resizable() and storage.nbytes() == weight.nbytes:
            storage.resize_(0)
        return bound

    def embedding(self, weight: torch.Tensor, head: Linear | None) -> Embedding:
        """As in ``base.Kernels``; a head's panels serve both, so that its weight is in memory once."""
        return head.rows_of if isinstance(head, NumbaLinear) else lambda ids: F.embedding(ids, weight)

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> NumbaGated:
        """As in ``base.Kernels``."""
        return NumbaGated(self._pool, self.linear(weight, bias), activation)

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> NumbaNorm:
        """As in ``base.Kernels``."""
        check_tensor(weight, self.dtype, (weight.shape[0],), "weight")
        check_tensor(bias, self.dtype, (weight.shape[0],), "bias")
        return NumbaNorm(self._pool, weight.contiguous(), bias.contiguous(), eps)

    def rms_norm(self, weight: torch.Tensor, eps: float) -> NumbaNorm:
        """As in ``base.Kernels``."""
        check_tensor(weight, self.dtype, (weight.shape[0],), "weight")
        return NumbaNorm(self._pool, weight.contiguous(), None, eps)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """As in ``base.Kernels``, in place."""
        rows, heads, width = x.shape
        x = checked_heads(x, self.dtype, (rows, heads, width), "heads")
        for angles in (cos, sin):
            check_tensor(angles, self.dtype, (rows, width // 2), "angles")
        cos, sin, size = cos.contiguous(), sin.contiguous(), x.element_size()
        job = np.zeros(JOB_FIELDS, np.int64)
        job[:11] = (
            ROTATE, x.data_ptr(), x.stride(0) * size, rows, width // 2, NORM_ROWS, 0, heads, x.stride(1) * size,
            cos.data_ptr(), sin.data_ptr(),
        )  # fmt: skip
        self._pool.run(job, -(-rows // NORM_ROWS), x.numel() * size >= SHARED_BYTES)
        return x

    def top_log_probs(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As in ``base.Kernels``."""
        rows, vocab = logits.shape
        if self.dtype != torch.float32:  # the pool is compiled for one type; float64 is there for tests
            values, ids = torch.log_softmax(logits, dim=1).sort(dim=1, descending=True, stable=True)
            return values[:, :count], ids[:, :count]  # among equals the lowest ids, however many are asked for
        check_tensor(logits, torch.float32, (rows, vocab), "logits")
        if not 1 <= count <= vocab:
            raise ValueError(f"count: expected 1 to {vocab}, got {count}")
        logits = logits.contiguous()
        values, ids = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
        job = np.zeros(JOB_FIELDS, np.int64)
        sums = np.empty(self._pool.threads * BLOCK, np.float32)
        job[:8] = (
            TOP, logits.data_ptr(), rows, vocab, count, values.data_ptr(), ids.data_ptr(), sums.ctypes.data,
        )  # fmt: skip
        self._pool.run(job, rows, logits.numel() * 4 >= SHARED_BYTES)
        return values, ids

    def prepare(self, cache: KVCache, batch: PagedBatch, scores: Scores | None = None) -> NumbaBatch:
        """As in ``base.Kernels``. Raises ValueError for tables that point outside of the pool."""
        return NumbaBatch(self._pool, self.dtype, cache, batch, scores)
