"""What is done to each row of a layer by itself: the gate of an MLP, and the rotation of heads by their positions.

Owns the loops over a chunk of rows, in place; knows neither threads nor tensors.
"""

from __future__ import annotations

from typing import Any

from numba import carray

from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.math import activate
from server.engine.kernels.numba.tiles import itemsize, pointer

# Fields of a job, by position; strides in bytes. WIDTH is a gate's, or half a head's.
KIND, X, ROW_STRIDE, ROWS, WIDTH, CHUNK_ROWS, ACTIVATION, HEADS, HEAD_STRIDE, COS, SIN = range(11)


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
