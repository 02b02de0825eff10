"""``residual + activation(x wᵀ + bias)`` in chunks of weight panels that fit the second-level cache.

Owns the loops around ``panel_tile``; knows neither threads nor tensors. A panel is read as it lies in memory, once for
up to ``CHUNK_ROWS`` rows, and while the rows take turns with it, each fetches its share of the next one: so memory and
arithmetic overlap. Each output is summed in an order that depends on ``in`` alone.
"""

from __future__ import annotations

from typing import Any

from numba import carray

from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.math import activate
from server.engine.kernels.numba.tiles import PANEL_BYTES, TILE_ROWS, itemsize, panel_tile, pointer

# Fields of a job, by position. All addresses, counts and strides in bytes are int64. OUT_STRIDE leaves room for whole
# panels; RESIDUAL, 0 for none, has rows RESIDUAL_STRIDE apart.
(
    KIND, X, X_STRIDE, PANELS, BIAS, OUT, OUT_STRIDE, ROWS, OUTS, COUNT, CHUNK_PANELS, CHUNK_ROWS, ACTIVATION,
    RESIDUAL, RESIDUAL_STRIDE,
) = range(15)  # fmt: skip

DEPTH_BYTES = 1024  # of a row at a time: of a float32 panel 16 KB, half of a first-level cache; short sums round less
AHEAD_BYTES = 1024  # how far ahead of itself a pass over few rows fetches, in each of its panels
FEW_ROWS = 3  # up to so many rows take several panels at a time, to have enough sums under way
_few_1, _few_2, _few_3 = panel_tile(1, 4), panel_tile(2, 3), panel_tile(3, 2)
_tile_1, _tile_2, _tile_3 = panel_tile(1, 1), panel_tile(2, 1), panel_tile(3, 1)
_tile_4, _tile_5, _tile_6 = panel_tile(4, 1), panel_tile(5, 1), panel_tile(6, 1)


@jit()
def _one_panel(zero: Any, x: int, xs: int, rows: int, w: int, count: int, out: int, os: int, acc: int, next: int,
               pace: int) -> None:  # fmt: skip
    """``rows <= TILE_ROWS`` by one panel."""
    if rows == 6:
        _tile_6(zero, x, xs, w, 0, count, out, os, acc, next, pace)
    elif rows == 5:
        _tile_5(zero, x, xs, w, 0, count, out, os, acc, next, pace)
    elif rows == 4:
        _tile_4(zero, x, xs, w, 0, count, out, os, acc, next, pace)
    elif rows == 3:
        _tile_3(zero, x, xs, w, 0, count, out, os, acc, next, pace)
    elif rows == 2:
        _tile_2(zero, x, xs, w, 0, count, out, os, acc, next, pace)
    else:
        _tile_1(zero, x, xs, w, 0, count, out, os, acc, next, pace)


@jit()
def _few_rows(zero: Any, x: int, xs: int, rows: int, w: int, panels: int, count: int, out: int, os: int) -> None:
    """``rows <= FEW_ROWS`` by all panels: each panel is read once, from its begin to its end."""
    size = itemsize(zero)
    panel, depth, together = count * PANEL_BYTES, DEPTH_BYTES // size, 5 - rows
    for first in range(0, panels, together):
        for start in range(0, max(count, 1), depth):
            part, at = min(depth, count - start), w + first * panel + start * PANEL_BYTES
            line, to, ahead = x + start * size, out + first * PANEL_BYTES, at + AHEAD_BYTES
            if first + together > panels:
                for p in range(panels - first):
                    _one_panel(
                        zero, line, xs, rows, at + p * panel, part, to + p * PANEL_BYTES, os, start,
                        ahead + p * panel, PANEL_BYTES,
                    )  # fmt: skip
            elif rows == 1:
                _few_1(zero, line, xs, at, panel, part, to, os, start, ahead, PANEL_BYTES)
            elif rows == 2:
                _few_2(zero, line, xs, at, panel, part, to, os, start, ahead, PANEL_BYTES)
            else:
                _few_3(zero, line, xs, at, panel, part, to, os, start, ahead, PANEL_BYTES)


@jit()
def _many_rows(zero: Any, x: int, xs: int, rows: int, w: int, panels: int, count: int, out: int, os: int) -> None:
    """``rows`` by all panels, a part of the depth at a time: what the rows have there stays in the cache."""
    size = itemsize(zero)
    panel, depth, tiles = count * PANEL_BYTES, DEPTH_BYTES // size, -(-rows // TILE_ROWS)
    for start in range(0, count, depth):
        part = min(depth, count - start)
        for p in range(panels):
            at = w + p * panel + start * PANEL_BYTES
            next = at + panel if p + 1 < panels else w + (start + part) * PANEL_BYTES
            share, row = part * PANEL_BYTES // tiles, 0
            for tile in range(tiles):
                height = (rows - row) // (tiles - tile)  # as even as can be: a low tile waits for its own sums
                _one_panel(
                    zero, x + row * xs + start * size, xs, height, at, part,
                    out + row * os + p * PANEL_BYTES, os, start, next + tile * share, PANEL_BYTES // tiles,
                )  # fmt: skip
                row += height


@jit(fastmath={"contract"})
def finish(zero: Any, job: Any, first_row: int, rows: int, first: int, outs: int) -> None:
    """Bias, activation and residual of a chunk: of ``rows`` from ``first_row``, ``outs`` from panel ``first``."""
    place, bias = first * PANEL_BYTES, job[BIAS] + first * PANEL_BYTES if job[BIAS] else 0
    for row in range(first_row, first_row + rows):
        out = job[OUT] + row * job[OUT_STRIDE] + place
        activate(zero, out, outs, bias, job[ACTIVATION])
        if job[RESIDUAL]:
            residual = job[RESIDUAL] + row * job[RESIDUAL_STRIDE] + place
            made, added = carray(pointer(zero, out), (outs,)), carray(pointer(zero, residual), (outs,))
            for i in range(outs):
                made[i] += added[i]


@jit(fastmath={"contract"})
def linear_chunk(zero: Any, job: Any, index: int) -> None:
    """One of ``ceil(rows / chunk rows) * ceil(panels / chunk panels)`` chunks of a layer.

    Chunks are counted through the rows first, so that threads share the weights that one has fetched.
    """
    size, count = itemsize(zero), job[COUNT]
    lanes = PANEL_BYTES // size
    row_blocks = -(-job[ROWS] // job[CHUNK_ROWS])
    first_row = index % row_blocks * job[CHUNK_ROWS]
    first = index // row_blocks * job[CHUNK_PANELS]
    rows = min(job[CHUNK_ROWS], job[ROWS] - first_row)
    panels = min(job[CHUNK_PANELS], -(-job[OUTS] // lanes) - first)
    x, xs, os = job[X] + first_row * job[X_STRIDE], job[X_STRIDE], job[OUT_STRIDE]
    out, w = job[OUT] + first_row * os + first * PANEL_BYTES, job[PANELS] + first * count * PANEL_BYTES
    if rows <= FEW_ROWS or count == 0:
        for row in range(0, rows, FEW_ROWS):  # without depth there are rows of zeros
            _few_rows(zero, x + row * xs, xs, min(FEW_ROWS, rows - row), w, panels, count, out + row * os, os)
    else:
        _many_rows(zero, x, xs, rows, w, panels, count, out, os)
    finish(zero, job, first_row, rows, first, min(panels * lanes, job[OUTS] - first * lanes))
