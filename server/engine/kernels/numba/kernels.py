"""The numba kernel set: float32 and float64 on a CPU, weights and block tables read at memory bandwidth.

Owns what a set offers. ``layers`` binds weights, ``paged`` prepares batches for attention; the loops are in ``linear``,
``int8``, ``norm``, ``rows``, ``attention`` and ``top``, the threads in ``pool``. Knows no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba.np.numpy_support import from_dtype

from server.engine.kernels.base import Activation, Embedding, KVCache, Linear, PagedBatch, Quantization, Scores
from server.engine.kernels.numba.attention import fill_tiles, write_blocks
from server.engine.kernels.numba.checks import check_tensor, checked_heads
from server.engine.kernels.numba.jit import types
from server.engine.kernels.numba.jobs import ROTATE, TOP, new_job, share_out
from server.engine.kernels.numba.layers import NORM_ROWS, Int8Linear, NumbaGated, NumbaLinear, NumbaNorm
from server.engine.kernels.numba.paged import NumbaBatch
from server.engine.kernels.numba.panels import quantized
from server.engine.kernels.numba.pool import WorkerPool
from server.engine.kernels.numba.top import BLOCK
from server.engine.kernels.threads import available_cores

DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


class NumbaKernels:
    """See ``base.Kernels``. Compiled when made (cached on disk), for one ``dtype``: float32 or float64.

    With ``take_weights`` the memory of a weight is given up once it is packed. ``quantize`` says what linear layers and
    embeddings keep of theirs, see ``base.Quantization``.
    """

    name = "numba"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        *,
        take_weights: bool = False,
        quantize: Quantization = "none",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"numba kernels: expected float32 or float64, got {dtype}")
        self.dtype, self._pool = dtype, WorkerPool(threads or available_cores(), DTYPES[dtype])
        self._take_weights, self._layer = take_weights, Int8Linear if quantize == "int8" else NumbaLinear
        self.close = self._pool.close
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
        bound = self._layer(self._pool, weight, bias, activation)
        self._give_up(weight)
        return bound

    def embedding(self, weight: torch.Tensor, head: Linear | None) -> Embedding:
        """As in ``base.Kernels``; a head's panels serve both, so that its weight is in memory once."""
        if isinstance(head, NumbaLinear):
            return head.rows_of
        if self._layer is not Int8Linear:
            return lambda ids: F.embedding(ids, weight)
        integers, scales = quantized(weight)
        self._give_up(weight)
        return lambda ids: integers[ids].to(self.dtype) * scales[ids, None]

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> NumbaGated:
        """As in ``base.Kernels``."""
        return NumbaGated(self.linear(weight, bias), activation)

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
        jobs = new_job(ROTATE)
        jobs[0, 1:11] = (
            x.data_ptr(), x.stride(0) * size, rows, width // 2, NORM_ROWS, 0, heads, x.stride(1) * size,
            cos.data_ptr(), sin.data_ptr(),
        )  # fmt: skip
        share_out(jobs[0], -(-rows // NORM_ROWS), x.numel() * size)
        self._pool.run(jobs)
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
        jobs, sums = new_job(TOP), np.empty(self._pool.threads * BLOCK, np.float32)
        jobs[0, 1:8] = (
            logits.data_ptr(), rows, vocab, count, values.data_ptr(), ids.data_ptr(), sums.ctypes.data,
        )  # fmt: skip
        share_out(jobs[0], rows, logits.numel() * 4)
        self._pool.run(jobs)
        return values, ids

    def prepare(self, cache: KVCache, batch: PagedBatch, scores: Scores | None = None) -> NumbaBatch:
        """As in ``base.Kernels``. Raises ValueError for tables that point outside of the pool."""
        return NumbaBatch(self._pool, self.dtype, cache, batch, scores)

    def _give_up(self, weight: torch.Tensor) -> None:
        """Free the memory of a weight that is packed, if it may be and nothing else lies there."""
        storage = weight.untyped_storage()
        if self._take_weights and storage.resizable() and storage.nbytes() == weight.nbytes:
            storage.resize_(0)
