"""Products of some rows with some others, both as they lie in memory: queries with a block's keys.

Owns the loops around ``dot_tile``; knows neither threads nor tensors.
"""

from __future__ import annotations

from typing import Any

from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.tiles import dot_tile, itemsize

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
