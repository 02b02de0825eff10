"""Norms of rows, with the residual sum before them: one pass to add, one or two to measure, one to write.

Owns the loop over a chunk of rows; knows neither threads nor tensors. Torch's own would share out even 8 rows to its
threads, and its parallel region ends only when the last of them has had a core.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.math import total
from server.engine.kernels.numba.tiles import itemsize, pointer

# Fields of a job, by position; all rows contiguous. RESIDUAL 0 is none; BIAS 0 is the root mean square's norm, which
# has neither mean nor bias; EPS is the address of a float64.
KIND, X, RESIDUAL, WEIGHT, BIAS, OUT, ROWS, WIDTH, CHUNK_ROWS, EPS = range(10)
_FLOAT64 = np.float64(0)


@jit(fastmath={"contract", "reassoc", "nsz"})
def _squares(zero: Any, address: int, count: int, mean: Any) -> Any:
    """Sum of ``(x - mean) ** 2``."""
    x = carray(pointer(zero, address), (count,))
    result = zero
    for i in range(count):
        d = x[i] - mean
        result += d * d
    return result


@jit(fastmath={"contract"})
def norm_chunk(zero: Any, job: Any, index: int) -> None:
    """``out = (s - mean) / sqrt(var + eps) * weight + bias`` of ``s = x (+ residual)``, for ``chunk rows`` of them.

    Without a bias the mean counts as 0.
    """
    size, real, width = itemsize(zero), type(zero), job[WIDTH]
    weight = carray(pointer(zero, job[WEIGHT]), (width,))
    eps = real(carray(pointer(_FLOAT64, job[EPS]), (1,))[0])
    first = index * job[CHUNK_ROWS]
    for row in range(first, min(first + job[CHUNK_ROWS], job[ROWS])):
        offset = row * width * size
        x = carray(pointer(zero, job[X] + offset), (width,))
        out = carray(pointer(zero, job[OUT] + offset), (width,))
        if job[RESIDUAL]:
            residual = carray(pointer(zero, job[RESIDUAL] + offset), (width,))
            for i in range(width):
                out[i] = x[i] + residual[i]
        else:
            for i in range(width):
                out[i] = x[i]
        mean = total(zero, job[OUT] + offset, width) / real(width) if job[BIAS] else zero
        variance = _squares(zero, job[OUT] + offset, width, mean) / real(width)
        scale = real(1) / math.sqrt(variance + eps)
        if math.isinf(variance):  # the row has overflowed: with a scale of 0 it would look finite
            scale = real(math.nan)
        if job[BIAS]:
            bias = carray(pointer(zero, job[BIAS]), (width,))
            for i in range(width):
                out[i] = (out[i] - mean) * scale * weight[i] + bias[i]
        else:
            for i in range(width):
                out[i] = out[i] * scale * weight[i]
