"""Layers with bound weights: linear ones, in floats or int8, gates and norms. Each fills jobs and has them run.

Owns what of a layer is prepared once and what in each call; knows no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from server.engine.kernels.base import Activation
from server.engine.kernels.numba import int8 as int8_job
from server.engine.kernels.numba import linear as linear_job
from server.engine.kernels.numba import norm as norm_job
from server.engine.kernels.numba import rows as rows_job
from server.engine.kernels.numba.checks import check_tensor, checked_rows
from server.engine.kernels.numba.jobs import GATE, INT8, LINEAR, NORM, QUANTIZE, Jobs, new_job, share_out
from server.engine.kernels.numba.math import GELU, GELU_NEW, NONE, RELU, SILU
from server.engine.kernels.numba.panels import Int8Panels, Panels
from server.engine.kernels.numba.pool import WorkerPool

CHUNK_ROWS = 72  # whole register tiles
CHUNK_BYTES = 192 << 10  # of weights: beside the activations of a chunk's rows they stay in a second-level cache
CHUNKS_PER_THREAD = 4
SLAB_ROWS = 1024  # activation rows that go through a layer together: more would not stay in the last-level cache
NORM_ROWS = 16  # rows in a chunk of what is done to each row by itself

_ACTIVATIONS = {"none": NONE, "gelu_new": GELU_NEW, "gelu": GELU, "relu": RELU, "silu": SILU}


class NumbaLinear:
    """``Linear`` with a bound weight, kept in panels."""

    _kind = LINEAR

    def __init__(
        self, pool: WorkerPool, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
    ) -> None:
        self.pool, self._dtype, (self.outs, self._count) = pool, weight.dtype, weight.shape
        self._panels, self._bias = self._packed(weight), bias
        packed = self._panels.packed
        panels, lanes = packed.shape[0], packed.shape[2]
        spread = max(1, -(-panels // (CHUNKS_PER_THREAD * pool.threads)))
        chunk = min(spread, max(CHUNK_BYTES // max(packed[:1].nbytes, 1), 1))
        self._chunk_panels = -(-chunk // 4) * 4  # as few rows take them
        self._chunks, self._padded = -(-panels // self._chunk_panels), panels * lanes
        self._jobs = new_job(self._kind)
        job = self._jobs[0]
        job[linear_job.ACTIVATION], job[linear_job.PANELS] = _ACTIVATIONS[activation], packed.data_ptr()
        job[linear_job.BIAS] = 0 if bias is None else bias.data_ptr()
        job[linear_job.OUT_STRIDE] = self._padded * weight.element_size()
        job[linear_job.OUTS : linear_job.CHUNK_ROWS + 1] = (
            self.outs, self._count, self._chunk_panels, CHUNK_ROWS,
        )  # fmt: skip

    def _packed(self, weight: torch.Tensor) -> Panels | Int8Panels:
        return Panels.of(weight)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        jobs, out, _kept = self.prepare(x, residual)
        self.pool.run(jobs)
        return out[:, : self.outs]

    def prepare(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[Jobs, torch.Tensor, Any]:
        """The jobs of a call, what they write, ``(rows, at least outs)``, and what must live until they are done."""
        x = checked_rows(x, self._dtype, (x.shape[0], self._count), "activations")
        if residual is not None:
            residual = checked_rows(residual, self._dtype, (x.shape[0], self.outs), "residual")
        out = torch.empty((x.shape[0], self._padded), dtype=x.dtype)
        jobs, slabs = self._jobs.copy(), -(-x.shape[0] // SLAB_ROWS)
        if slabs > 1:  # the last job once for each
            jobs = np.concatenate([jobs, jobs[-1:].repeat(slabs - 1, axis=0)])
        address, stride, kept = self._inputs(jobs, x)
        self._fill(jobs[-max(slabs, 1) :], address, stride, out, residual)
        return jobs, out, (kept, residual)

    def _inputs(self, jobs: Jobs, x: torch.Tensor) -> tuple[int, int, Any]:
        """Address and stride in bytes of the rows that the slabs take, and what must live until they are done."""
        return x.data_ptr(), x.stride(0) * x.element_size(), x

    def _fill(self, slabs: Jobs, x: int, x_stride: int, out: torch.Tensor, residual: torch.Tensor | None) -> None:
        rows, out_stride, read = out.shape[0], out.stride(0) * out.element_size(), self._panels.packed.nbytes
        for job, start in zip(slabs, range(0, max(rows, 1), SLAB_ROWS), strict=True):
            count = min(SLAB_ROWS, rows - start)
            job[linear_job.X], job[linear_job.X_STRIDE] = x + start * x_stride, x_stride
            job[linear_job.OUT], job[linear_job.ROWS] = out.data_ptr() + start * out_stride, count
            if residual is not None:
                residual_stride = residual.stride(0) * residual.element_size()
                job[linear_job.RESIDUAL] = residual.data_ptr() + start * residual_stride
                job[linear_job.RESIDUAL_STRIDE] = residual_stride
            share_out(job, -(-count // CHUNK_ROWS) * self._chunks, read * -(-count // 4))

    def rows_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """The weight's rows of ``outputs (n,)``: ``(n, in)``."""
        return self._panels.rows_of(outputs)


class Int8Linear(NumbaLinear):
    """``Linear`` with an int8 weight. Its inputs are rounded to int16, each row by itself.

    They have as many bits as a sum of products has room for in 32: 14 of 768 inputs, 12 of 3,072, 10 of 14,336. Raises
    ValueError where that is fewer than the weights have.
    """

    _kind = INT8

    def __init__(
        self, pool: WorkerPool, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
    ) -> None:
        limit = min((2**31 - 1) // (127 * max(weight.shape[1], 1)), 2**15 - 1)
        if limit < 127:
            most, got = 2**31 // 127**2, weight.shape[1]
            raise ValueError(f"quantize int8: expected at most {most} inputs to a layer, got {got}; use none")
        super().__init__(pool, weight, bias, activation)
        self._width = 2 * -(-self._count // 2)  # of a rounded row
        assert isinstance(self._panels, Int8Panels)
        self._jobs[0, linear_job.COUNT] = self._width // 2
        self._jobs[0, int8_job.W_SCALES] = self._panels.scales.data_ptr()
        rounding = new_job(QUANTIZE)
        rounding[0, rows_job.WIDTH], rounding[0, rows_job.CHUNK_ROWS] = self._count, NORM_ROWS
        rounding[0, rows_job.OUT_WIDTH], rounding[0, rows_job.LIMIT] = self._width, limit
        self._jobs = np.concatenate([rounding, self._jobs])

    def _packed(self, weight: torch.Tensor) -> Int8Panels:
        return Int8Panels.of(weight)

    def _inputs(self, jobs: Jobs, x: torch.Tensor) -> tuple[int, int, Any]:
        rows, size, first = x.shape[0], x.element_size(), jobs[0]
        rounded, scales = torch.empty((rows, self._width), dtype=torch.int16), torch.empty(rows, dtype=x.dtype)
        first[rows_job.X], first[rows_job.ROW_STRIDE], first[rows_job.ROWS] = x.data_ptr(), x.stride(0) * size, rows
        first[rows_job.OUT], first[rows_job.SCALES] = rounded.data_ptr(), scales.data_ptr()
        share_out(first, -(-rows // NORM_ROWS), x.nbytes)
        jobs[1:, int8_job.X_SCALES] = np.arange(len(jobs) - 1) * SLAB_ROWS * size + scales.data_ptr()
        return rounded.data_ptr(), self._width * 2, (x, rounded, scales)


class NumbaGated:
    """A linear layer whose outputs are a gate and what it lets through; the result is a view of both."""

    def __init__(self, linear: NumbaLinear, activation: Activation) -> None:
        self._linear, self._width, self._jobs = linear, linear.outs // 2, new_job(GATE)
        self._jobs[0, rows_job.WIDTH], self._jobs[0, rows_job.CHUNK_ROWS] = self._width, NORM_ROWS
        self._jobs[0, rows_job.ACTIVATION] = _ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        before, both, _kept = self._linear.prepare(x)
        jobs, rows = np.concatenate([before, self._jobs]), both.shape[0]
        job = jobs[-1]
        job[rows_job.X], job[rows_job.ROW_STRIDE] = both.data_ptr(), both.stride(0) * both.element_size()
        job[rows_job.ROWS] = rows
        share_out(job, -(-rows // NORM_ROWS), both.nbytes)
        self._linear.pool.run(jobs)
        return both[:, : self._width]


class NumbaNorm:
    """``Norm`` with bound weights; without a bias the root mean square's."""

    def __init__(self, pool: WorkerPool, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self._weight, self._bias = weight, bias  # kept: the job has their addresses
        self._pool, self._width, self._eps = pool, weight.shape[0], np.array([eps], np.float64)
        self._jobs = new_job(NORM)
        job = self._jobs[0]
        job[norm_job.WIDTH], job[norm_job.CHUNK_ROWS] = self._width, NORM_ROWS
        job[norm_job.WEIGHT], job[norm_job.BIAS] = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        job[norm_job.EPS] = self._eps.ctypes.data

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.shape[0]
        check_tensor(x, self._weight.dtype, (rows, self._width), "activations")
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        jobs = self._jobs.copy()
        job = jobs[0]
        if residual is not None:
            check_tensor(residual, self._weight.dtype, (rows, self._width), "residual")
            residual = residual.contiguous()
            job[norm_job.RESIDUAL] = residual.data_ptr()
        job[norm_job.X], job[norm_job.OUT], job[norm_job.ROWS] = x.data_ptr(), out.data_ptr(), rows
        share_out(job, -(-rows // NORM_ROWS), out.nbytes)
        self._pool.run(jobs)
        return out
