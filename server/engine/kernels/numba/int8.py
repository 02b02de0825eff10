"""``residual + activation(x wᵀ + bias)`` with int8 weights and rows of int16, in chunks of weight panels.

Owns the loops around ``int8_tile``; knows neither threads nor tensors. Integers are summed exactly, through the whole
depth at once, so that no order of them changes a bit.
"""

from __future__ import annotations

from typing import Any

from server.engine.kernels.numba import linear
from server.engine.kernels.numba.int8_tile import int8_tile
from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.tiles import PANEL_BYTES, TILE_ROWS, itemsize

# Fields of a job as of ``linear``'s, but COUNT is pairs of inputs, and behind them the addresses of scales.
X_SCALES, W_SCALES = 15, 16

_few_1, _few_2, _few_3 = int8_tile(1, 4), int8_tile(2, 3), int8_tile(3, 2)
_tile_1, _tile_2, _tile_3 = int8_tile(1, 1), int8_tile(2, 1), int8_tile(3, 1)
_tile_4, _tile_5, _tile_6 = int8_tile(4, 1), int8_tile(5, 1), int8_tile(6, 1)


@jit()
def _one_panel(zero: Any, x: int, xs: int, rows: int, w: int, pairs: int, out: int, os: int, scales: int,
               w_scales: int, next: int, pace: int) -> None:  # fmt: skip
    """``rows <= TILE_ROWS`` by one panel."""
    if rows == 6:
        _tile_6(zero, x, xs, w, 0, pairs, out, os, scales, w_scales, next, pace)
    elif rows == 5:
        _tile_5(zero, x, xs, w, 0, pairs, out, os, scales, w_scales, next, pace)
    elif rows == 4:
        _tile_4(zero, x, xs, w, 0, pairs, out, os, scales, w_scales, next, pace)
    elif rows == 3:
        _tile_3(zero, x, xs, w, 0, pairs, out, os, scales, w_scales, next, pace)
    elif rows == 2:
        _tile_2(zero, x, xs, w, 0, pairs, out, os, scales, w_scales, next, pace)
    else:
        _tile_1(zero, x, xs, w, 0, pairs, out, os, scales, w_scales, next, pace)


@jit()
def _few_rows(zero: Any, x: int, xs: int, rows: int, w: int, panels: int, pairs: int, out: int, os: int, scales: int,
              w_scales: int) -> None:  # fmt: skip
    """``rows <= FEW_ROWS`` by all panels, several at a time."""
    step = PANEL_BYTES // itemsize(zero) * 2
    panel, together = pairs * step, 5 - rows
    for first in range(0, panels, together):
        at, to, of = w + first * panel, out + first * PANEL_BYTES, w_scales + first * PANEL_BYTES
        if first + together > panels:
            for p in range(panels - first):
                part = at + p * panel
                _one_panel(
                    zero, x, xs, rows, part, pairs, to + p * PANEL_BYTES, os, scales, of + p * PANEL_BYTES,
                    part + linear.AHEAD_BYTES, step,
                )  # fmt: skip
        elif rows == 1:
            _few_1(zero, x, xs, at, panel, pairs, to, os, scales, of, at + linear.AHEAD_BYTES, step)
        elif rows == 2:
            _few_2(zero, x, xs, at, panel, pairs, to, os, scales, of, at + linear.AHEAD_BYTES, step)
        else:
            _few_3(zero, x, xs, at, panel, pairs, to, os, scales, of, at + linear.AHEAD_BYTES, step)


@jit()
def _many_rows(zero: Any, x: int, xs: int, rows: int, w: int, panels: int, pairs: int, out: int, os: int, scales: int,
               w_scales: int) -> None:  # fmt: skip
    """``rows`` by all panels: while the rows take turns with a panel, each fetches its share of the next one."""
    size, tiles = itemsize(zero), -(-rows // TILE_ROWS)
    step = PANEL_BYTES // size * 2
    panel = pairs * step
    for p in range(panels):
        at, share, row = w + p * panel, panel // tiles, 0
        for tile in range(tiles):
            height = (rows - row) // (tiles - tile)
            _one_panel(
                zero, x + row * xs, xs, height, at, pairs, out + row * os + p * PANEL_BYTES, os, scales + row * size,
                w_scales + p * PANEL_BYTES, at + panel + tile * share, step // tiles,
            )  # fmt: skip
            row += height


@jit()
def int8_chunk(zero: Any, job: Any, index: int) -> None:
    """A chunk of a layer, as ``linear_chunk``."""
    size, pairs = itemsize(zero), job[linear.COUNT]
    lanes = PANEL_BYTES // size
    row_blocks = -(-job[linear.ROWS] // job[linear.CHUNK_ROWS])
    first_row = index % row_blocks * job[linear.CHUNK_ROWS]
    first = index // row_blocks * job[linear.CHUNK_PANELS]
    rows = min(job[linear.CHUNK_ROWS], job[linear.ROWS] - first_row)
    panels = min(job[linear.CHUNK_PANELS], -(-job[linear.OUTS] // lanes) - first)
    x, xs, os = job[linear.X] + first_row * job[linear.X_STRIDE], job[linear.X_STRIDE], job[linear.OUT_STRIDE]
    out, w = job[linear.OUT] + first_row * os + first * PANEL_BYTES, job[linear.PANELS] + first * pairs * lanes * 2
    scales, w_scales = job[X_SCALES] + first_row * size, job[W_SCALES] + first * PANEL_BYTES
    if rows <= linear.FEW_ROWS:
        _few_rows(zero, x, xs, rows, w, panels, pairs, out, os, scales, w_scales)
    else:
        _many_rows(zero, x, xs, rows, w, panels, pairs, out, os, scales, w_scales)
    linear.finish(zero, job, first_row, rows, first, min(panels * lanes, job[linear.OUTS] - first * lanes))
