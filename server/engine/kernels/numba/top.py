"""The most likely tokens of each row of logits, with their log-probabilities, in two passes at memory bandwidth.

Owns the loop over one row; knows neither threads nor tensors. Beam search needs no more of a row than this.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.math import add_exponentials, total
from server.engine.kernels.numba.tiles import itemsize, pointer

# Fields of a job, by position. A chunk is a row; VALUES and IDS (int64) have K places for each.
# SUMS is scratch memory, BLOCK elements for each thread.
KIND, LOGITS, ROWS, VOCAB, K, VALUES, IDS, SUMS = range(8)
BLOCK = 64  # logits that are skipped together if none of them is among the best
_INT64 = np.int64(0)


@jit(fastmath={"contract", "reassoc", "nsz"})
def _greatest(zero: Any, address: int, count: int) -> Any:
    x = carray(pointer(zero, address), (count,))
    result = x[0]
    for i in range(count):
        result = max(result, x[i])
    return result


@jit()
def _insert(value: Any, token: int, values: Any, ids: Any, filled: int) -> None:
    """Place ``value`` in the descending ``values[:filled]``, behind its equals; the last one falls off if full."""
    place = min(filled, values.size - 1)
    while place > 0 and values[place - 1] < value:
        values[place], ids[place] = values[place - 1], ids[place - 1]
        place -= 1
    values[place], ids[place] = value, token


@jit()
def top_chunk(zero: Any, job: Any, row: int, thread: int) -> None:
    """``values, ids`` of the row's ``k`` greatest logits, best first, then ``values -= logsumexp(logits)``."""
    size, real, vocab, k = itemsize(zero), type(zero), job[VOCAB], job[K]
    address = job[LOGITS] + row * vocab * size
    x = carray(pointer(zero, address), (vocab,))
    values, ids = (
        carray(pointer(zero, job[VALUES] + row * k * size), (k,)),
        carray(pointer(_INT64, job[IDS] + row * k * 8), (k,)),
    )
    filled = 0
    while filled < k:
        _insert(x[filled], filled, values, ids, filled)
        filled += 1
    for start in range(k, vocab, BLOCK):
        count = min(BLOCK, vocab - start)
        if _greatest(zero, address + start * size, count) > values[k - 1]:
            for i in range(start, start + count):
                if x[i] > values[k - 1]:
                    _insert(x[i], i, values, ids, k)
    greatest, sums = values[0], job[SUMS] + thread * BLOCK * size
    lanes = carray(pointer(zero, sums), (BLOCK,))
    for i in range(BLOCK):
        lanes[i] = zero
    for start in range(0, vocab, BLOCK):
        add_exponentials(zero, address + start * size, min(BLOCK, vocab - start), greatest, sums)
    log_total = real(math.log(total(zero, sums, BLOCK)))
    for i in range(k):
        values[i] = values[i] - greatest - log_total
