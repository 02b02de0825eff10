"""``activation(x wᵀ + bias)`` in chunks of weight rows that fit the second-level cache.

Owns the loops around ``dot_tile``; knows neither threads nor tensors. Vectors run along ``in``, so the weight stays as
it is, ``(out, in)``, and one activation row costs one pass over it at memory bandwidth. Each output is summed in an
order that depends on ``in`` alone.
"""

from __future__ import annotations

from typing import Any

from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.math import activate
from server.engine.kernels.numba.tiles import dot_tile, itemsize

# Fields of a job, by position. All addresses, counts and strides in bytes are int64.
KIND, X, X_STRIDE, WEIGHT, BIAS, OUT, ROWS, OUTS, COUNT, CHUNK_OUTS, CHUNK_ROWS, ACTIVATION = range(12)

DEPTH_BYTES = 4096  # bytes of a row at a time: four activation rows and three weight rows stay in a 32 KB cache
_first_4x3, _tile_4x3, _tile_4x1 = dot_tile(4, 3, prefetch=True), dot_tile(4, 3), dot_tile(4, 1)
_tile_3x4, _tile_3x1 = dot_tile(3, 4, prefetch=True), dot_tile(3, 1)
_tile_2x4, _tile_2x1 = dot_tile(2, 4, prefetch=True), dot_tile(2, 1)
_tile_1x4, _tile_1x1 = dot_tile(1, 4, prefetch=True), dot_tile(1, 1)


@jit()
def dots(
    zero: Any, x: int, xs: int, rows: int, w: int, ws: int, columns: int, count: int, out: int, os: int, acc: int
) -> None:
    """``out[r, c] (+)= x[r] . w[c]`` for ``rows x columns``; addresses, strides in bytes."""
    size = itemsize(zero)
    r = 0
    while r + 4 <= rows:
        c = 0
        while c + 3 <= columns:
            if r == 0:  # the pass that fetches the weights; the others find them in the cache
                _first_4x3(zero, x, xs, w + c * ws, ws, count, out + c * size, os, acc)
            else:
                _tile_4x3(zero, x + r * xs, xs, w + c * ws, ws, count, out + r * os + c * size, os, acc)
            c += 3
        while c < columns:
            _tile_4x1(zero, x + r * xs, xs, w + c * ws, ws, count, out + r * os + c * size, os, acc)
            c += 1
        r += 4
    c = 0
    if rows - r == 3:
        while c + 4 <= columns:
            _tile_3x4(zero, x + r * xs, xs, w + c * ws, ws, count, out + r * os + c * size, os, acc)
            c += 4
        while c < columns:
            _tile_3x1(zero, x + r * xs, xs, w + c * ws, ws, count, out + r * os + c * size, os, acc)
            c += 1
    elif rows - r == 2:
        while c + 4 <= columns:
            _tile_2x4(zero, x + r * xs, xs, w + c * ws, ws, count, out + r * os + c * size, os, acc)
            c += 4
        while c < columns:
            _tile_2x1(zero, x + r * xs, xs, w + c * ws, ws, count, out + r * os + c * size, os, acc)
            c += 1
    elif rows - r == 1:
        while c + 4 <= columns:
            _tile_1x4(zero, x + r * xs, xs, w + c * ws, ws, count, out + r * os + c * size, os, acc)
            c += 4
        while c < columns:
            _tile_1x1(zero, x + r * xs, xs, w + c * ws, ws, count, out + r * os + c * size, os, acc)
            c += 1


@jit()
def linear_chunk(zero: Any, job: Any, index: int) -> None:
    """One of ``ceil(rows / chunk rows) * ceil(outs / chunk outs)`` chunks of ``out = activation(x wᵀ + bias)``.

    Chunks are counted through the rows first, so that threads share the weights that one has fetched.
    """
    size = itemsize(zero)
    row_blocks = -(-job[ROWS] // job[CHUNK_ROWS])
    first_row = index % row_blocks * job[CHUNK_ROWS]
    first_out = index // row_blocks * job[CHUNK_OUTS]
    rows = min(job[CHUNK_ROWS], job[ROWS] - first_row)
    outs = min(job[CHUNK_OUTS], job[OUTS] - first_out)
    out_stride, depth = job[OUTS] * size, DEPTH_BYTES // size
    out = job[OUT] + first_row * out_stride + first_out * size
    x = job[X] + first_row * job[X_STRIDE]
    w = job[WEIGHT] + first_out * job[COUNT] * size
    for start in range(0, max(job[COUNT], 1), depth):
        count = min(depth, job[COUNT] - start)
        dots(
            zero, x + start * size, job[X_STRIDE], rows, w + start * size, job[COUNT] * size, outs, count,
            out, out_stride, start,
        )  # fmt: skip
    bias = job[BIAS] + first_out * size if job[BIAS] else 0
    for row in range(rows):
        activate(zero, out + row * out_stride, outs, bias, job[ACTIVATION])
