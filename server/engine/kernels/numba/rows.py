"""What is done to each row of a layer by itself: an MLP's gate, heads' rotation by their positions, rounding to int16.

Owns the loops over a chunk of rows, the first two in place; knows neither threads nor tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.math import activate
from server.engine.kernels.numba.tiles import itemsize, pointer

# Fields of a job, by position; strides in bytes. WIDTH is a gate's, or half a head's.
KIND, X, ROW_STRIDE, ROWS, WIDTH, CHUNK_ROWS, ACTIVATION, HEADS, HEAD_STRIDE, COS, SIN = range(11)
OUT, OUT_WIDTH, SCALES, LIMIT = range(6, 10)  # of rounding, where the others have what they alone need
_INT16 = np.int16(0)
_SMALLEST = 1e-30  # a row below it is zero


@jit(fastmath={"contract"})
def gate_chunk(zero: Any, job: Any, index: int) -> None:
    """``x[:width] = activation(x[:width]) * x[width:]`` of a chunk's rows."""
    width, first = job[WIDTH], index * job[CHUNK_ROWS]
    for row in range(first, min(first + job[CHUNK_ROWS], job[ROWS])):
        address = job[X] + row * job[ROW_STRIDE]
        activate(zero, address, width, 0, job[ACTIVATION])
        gate = carray(pointer(zero, address), (width,))
        other = carray(pointer(zero, address + width * itemsize(zero)), (width,))
        for i in range(width):
            gate[i] *= other[i]


@jit(fastmath={"contract"})
def rotate_chunk(zero: Any, job: Any, index: int) -> None:
    """Rotate the heads of a chunk's rows, each pair ``(i, i + width)`` by the row's angle ``i``."""
    width, size, first = job[WIDTH], itemsize(zero), index * job[CHUNK_ROWS]
    for row in range(first, min(first + job[CHUNK_ROWS], job[ROWS])):
        cos = carray(pointer(zero, job[COS] + row * width * size), (width,))
        sin = carray(pointer(zero, job[SIN] + row * width * size), (width,))
        for head in range(job[HEADS]):
            address = job[X] + row * job[ROW_STRIDE] + head * job[HEAD_STRIDE]
            low = carray(pointer(zero, address), (width,))
            high = carray(pointer(zero, address + width * size), (width,))
            for i in range(width):
                a, b = low[i], high[i]
                low[i] = a * cos[i] - b * sin[i]
                high[i] = b * cos[i] + a * sin[i]


@jit(fastmath={"contract", "reassoc", "nsz"})
def _greatest(zero: Any, address: int, count: int) -> Any:
    """The greatest magnitude; NaN if any element is not finite."""
    x = carray(pointer(zero, address), (count,))
    greatest, spoilt = zero, zero
    for i in range(count):
        greatest = max(greatest, abs(x[i]))
    for i in range(count):
        spoilt += x[i] * zero
    return greatest + spoilt


@jit(fastmath={"contract"})
def quantize_chunk(zero: Any, job: Any, index: int) -> None:
    """``out = round(x / scale)`` in int16 with ``scale = max|x| / limit`` of each of a chunk's rows.

    A row that is not all finite has zeros and a scale of NaN.
    """
    real, width, limit, first = type(zero), job[WIDTH], job[LIMIT], index * job[CHUNK_ROWS]
    scales = carray(pointer(zero, job[SCALES]), (job[ROWS],))
    for row in range(first, min(first + job[CHUNK_ROWS], job[ROWS])):
        address = job[X] + row * job[ROW_STRIDE]
        x = carray(pointer(zero, address), (width,))
        out = carray(pointer(_INT16, job[OUT] + row * job[OUT_WIDTH] * 2), (job[OUT_WIDTH],))
        greatest = _greatest(zero, address, width)
        scales[row] = greatest / real(limit)
        if greatest > real(_SMALLEST):  # not if it is NaN
            inverse = real(limit) / greatest
            for i in range(width):
                out[i] = np.int16(np.rint(x[i] * inverse))
        else:
            for i in range(width):
                out[i] = 0
        for i in range(width, job[OUT_WIDTH]):
            out[i] = 0
