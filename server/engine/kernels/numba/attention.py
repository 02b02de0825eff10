"""Attention over block tables, one (query tile, key head) at a time, and the writing of keys and values into blocks.

Owns the walk over a row's two segments and the softmax between its two passes; knows neither threads nor tensors.
Blocks are read in place: nothing is gathered or padded. A token's result does not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.math import add_by_distance, exponentials, scaled_maximum, total
from server.engine.kernels.numba.products import dots
from server.engine.kernels.numba.tiles import VECTOR_BYTES, itemsize, mix_tile, pointer

# Fields of a job, by position; strides in bytes. TILES: (row, token, token within its row, tokens) each, int32. SCALE:
# the address of a float64. BIAS: 0 is none, else (heads, 2 * REACH + 1).
(
    KIND, QUERY, QUERY_TOKEN, QUERY_HEAD, KEYS, VALUES, OUT, HEADS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, TILES, TILE_COUNT,
    COUNTS, TABLES, MAX_BLOCKS, LENGTHS, CAUSAL, SCRATCH, SCRATCH_ROW,
    SCALE, BIAS, REACH, UNPLACED,
) = range(24)  # fmt: skip

QUERY_TILE = 4
_INT32, _INT64, _FLOAT64 = np.int32(0), np.int64(0), np.float64(0)
_mix_1x8, _mix_1x1, _mix_1 = mix_tile(1, 8), mix_tile(1, 1), mix_tile(1, 0)
_mix_4x2, _mix_4x1, _mix_4 = mix_tile(4, 2), mix_tile(4, 1), mix_tile(4, 0)


@jit()
def _mix(zero: Any, p: int, ps: int, rows: int, v: int, vs: int, count: int, width: int, out: int, os: int) -> None:
    """``out[r, :width] += p[r, :count] v[:count, :width]`` for ``rows`` rows, four at a time."""
    size = itemsize(zero)
    lanes = VECTOR_BYTES // size
    r = 0
    while r + 4 <= rows:
        part, line, d = p + r * ps, out + r * os, 0
        while d + 2 * lanes <= width:
            _mix_4x2(zero, part, ps, v + d * size, vs, count, line + d * size, os, 1)
            d += 2 * lanes
        while d + lanes <= width:
            _mix_4x1(zero, part, ps, v + d * size, vs, count, line + d * size, os, 1)
            d += lanes
        while d < width:
            _mix_4(zero, part, ps, v + d * size, vs, count, line + d * size, os, 1)
            d += 1
        r += 4
    while r < rows:
        part, line, d = p + r * ps, out + r * os, 0
        while d + 8 * lanes <= width:
            _mix_1x8(zero, part, ps, v + d * size, vs, count, line + d * size, os, 1)
            d += 8 * lanes
        while d + lanes <= width:
            _mix_1x1(zero, part, ps, v + d * size, vs, count, line + d * size, os, 1)
            d += lanes
        while d < width:
            _mix_1(zero, part, ps, v + d * size, vs, count, line + d * size, os, 1)
            d += 1
        r += 1


@jit()
def attention_chunk(zero: Any, job: Any, index: int, thread: int) -> None:
    """Chunk ``index`` of ``tiles * kv_heads``: attend the tokens of a tile with the query heads that share a key head.

    So a block is fetched once for all of them. A line of scores belongs to one token and head; with one token the
    group's lines are as far apart as its queries, and a block meets all of them in one product. ``thread`` chooses the
    scratch memory for scores.
    """
    size, real = itemsize(zero), type(zero)
    heads, kv_heads, width, block_size = job[HEADS], job[KV_HEADS], job[HEAD_DIM], job[BLOCK_SIZE]
    max_blocks, kv_head, group = job[MAX_BLOCKS], index % kv_heads, heads // kv_heads
    tile = carray(pointer(_INT32, job[TILES] + index // kv_heads * 16), (4,))
    row, tokens = tile[0], tile[3]
    lengths = carray(pointer(_INT32, job[LENGTHS] + row * 8), (2,))
    prefix, own = np.int64(lengths[0]), np.int64(lengths[1])
    first, step = own, 0  # keys of segment 1 that the tile's first token sees, and how many more each next one
    if job[CAUSAL]:
        first, step = own - carray(pointer(_INT32, job[COUNTS] + row * 4), (1,))[0] + tile[2] + 1, 1
    visible = (prefix, first + step * (tokens - 1))

    query = job[QUERY] + tile[1] * job[QUERY_TOKEN] + kv_head * group * job[QUERY_HEAD]
    out = job[OUT] + (tile[1] * heads + kv_head * group) * width * size
    # ``parts`` products with a block, each of ``lines`` queries: of one head its tokens, or of one token its heads.
    parts, lines, part_bytes, line_bytes = group, tokens, job[QUERY_HEAD], job[QUERY_TOKEN]
    out_part, out_line = width * size, heads * width * size
    if tokens == 1:
        parts, lines, part_bytes, line_bytes = 1, group, 0, job[QUERY_HEAD]
        out_part, out_line = 0, width * size
    line = job[SCRATCH_ROW]
    scores = job[SCRATCH] + thread * QUERY_TILE * group * line
    block_bytes = kv_heads * block_size * width * size
    head_offset = kv_head * block_size * width * size

    for segment in range(2):
        blocks = carray(pointer(_INT32, job[TABLES] + (row * 2 + segment) * max_blocks * 4), (max_blocks,))
        place = scores + segment * prefix * size
        for start in range(0, visible[segment], block_size):
            keys = job[KEYS] + blocks[start // block_size] * block_bytes + head_offset
            count = min(block_size, visible[segment] - start)
            for part in range(parts):
                dots(
                    zero, query + part * part_bytes, line_bytes, lines, keys, width * size, count, width,
                    place + part * lines * line + start * size, line, 0,
                )  # fmt: skip

    scale = real(carray(pointer(_FLOAT64, job[SCALE]), (1,))[0])
    longest = prefix + visible[1]
    for at in range(tokens * group):
        part, token = at // lines, at % lines if tokens > 1 else 0
        count, address = prefix + first + step * token, scores + at * line
        result = carray(pointer(zero, out + part * out_part + at % lines * out_line), (width,))
        for d in range(width):
            result[d] = zero
        if count == 0:
            continue
        left = scale  # what the scores are still to be multiplied by
        if job[BIAS]:
            table = job[BIAS] + (kv_head * group + at // tokens) * (2 * job[REACH] + 1) * size
            unplaced = carray(pointer(_INT32, job[UNPLACED] + row * 4), (1,))[0]
            position = prefix + own - carray(pointer(_INT32, job[COUNTS] + row * 4), (1,))[0] + tile[2] + token
            add_by_distance(zero, address, count, scale, table, job[REACH], np.int64(unplaced), position)
            left = real(1)
        exponentials(zero, address, count, scaled_maximum(zero, address, count, left))
        weights = carray(pointer(zero, address), (longest,))
        share = real(1) / total(zero, address, count)
        for i in range(count):
            weights[i] *= share
        for i in range(count, longest):
            weights[i] = zero

    for segment in range(2):
        blocks = carray(pointer(_INT32, job[TABLES] + (row * 2 + segment) * max_blocks * 4), (max_blocks,))
        place = scores + segment * prefix * size
        for start in range(0, visible[segment], block_size):
            values = job[VALUES] + blocks[start // block_size] * block_bytes + head_offset
            count = min(block_size, visible[segment] - start)
            for part in range(parts):
                _mix(
                    zero, place + part * lines * line + start * size, line, lines, values, width * size, count, width,
                    out + part * out_part, out_line,
                )  # fmt: skip


@jit()
def write_blocks(
    zero: Any, keys: int, values: int, slots: int, tokens: int, key: int, value: int, key_token: int, key_head: int,
    value_token: int, value_head: int, kv_heads: int, block_size: int, width: int
) -> None:  # fmt: skip
    """Copy each token's key and value, ``(tokens, kv_heads, width)`` with strides in bytes, to its slot."""
    size = itemsize(zero)
    places = carray(pointer(_INT64, slots), (tokens,))
    for t in range(tokens):
        block, offset = places[t] // block_size, places[t] % block_size
        for h in range(kv_heads):
            to = (((block * kv_heads) + h) * block_size + offset) * width * size
            to_key = carray(pointer(zero, keys + to), (width,))
            to_value = carray(pointer(zero, values + to), (width,))
            from_key = carray(pointer(zero, key + t * key_token + h * key_head), (width,))
            from_value = carray(pointer(zero, value + t * value_token + h * value_head), (width,))
            for d in range(width):
                to_key[d] = from_key[d]
                to_value[d] = from_value[d]


@jit()
def fill_tiles(counts: Any, tiles: Any) -> int:
    """Write (row, token, token within its row, tokens) for every tile of rows with ``counts`` tokens. Returns how many.
    """
    filled, start = 0, 0
    for row in range(counts.size):
        for first in range(0, counts[row], QUERY_TILE):
            tiles[filled, 0] = row
            tiles[filled, 1] = start + first
            tiles[filled, 2] = first
            tiles[filled, 3] = min(QUERY_TILE, counts[row] - first)
            filled += 1
        start += counts[row]
    return filled
