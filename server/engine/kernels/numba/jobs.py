"""What a kernel is asked for: a record of addresses, counts and strides, done in chunks that threads share out.

Owns the kinds of jobs and the fields that all of them have; each kernel's file has its own between.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from server.engine.kernels.numba.attention import attention_chunk
from server.engine.kernels.numba.int8 import int8_chunk
from server.engine.kernels.numba.jit import jit
from server.engine.kernels.numba.linear import linear_chunk
from server.engine.kernels.numba.norm import norm_chunk
from server.engine.kernels.numba.rows import gate_chunk, quantize_chunk, rotate_chunk
from server.engine.kernels.numba.top import top_chunk

Jobs = np.ndarray[Any, np.dtype[np.int64]]
"""``(n, JOB_FIELDS)``, to be done in turn."""
LINEAR, ATTENTION, NORM, TOP, GATE, ROTATE, QUANTIZE, INT8 = range(8)  # field 0 of every job
JOB_FIELDS = 32
CHUNKS, SHARED = JOB_FIELDS - 2, JOB_FIELDS - 1  # the last two: how many chunks, and whether several threads take them
MAX_CHUNKS = 2**22 - 1
SHARED_BYTES = 1 << 18  # a job that reads less is done by the calling thread alone


def new_job(kind: int) -> Jobs:
    """One job with nothing but its kind."""
    jobs = np.zeros((1, JOB_FIELDS), np.int64)
    jobs[0, 0] = kind
    return jobs


def share_out(job: Any, chunks: int, read: int) -> None:
    """Say of one job, ``(JOB_FIELDS,)``, how many chunks it has and how many bytes it reads."""
    if not 0 <= chunks <= MAX_CHUNKS:
        raise ValueError(f"expected 0 to {MAX_CHUNKS} chunks in a job, got {chunks}")
    job[CHUNKS], job[SHARED] = chunks, read >= SHARED_BYTES


@jit()
def do_chunk(zero: Any, job: Any, index: int, thread: int) -> None:
    """One of the chunks of ``job (JOB_FIELDS,)``."""
    if job[0] == LINEAR:
        linear_chunk(zero, job, index)
    elif job[0] == NORM:
        norm_chunk(zero, job, index)
    elif job[0] == TOP:
        top_chunk(zero, job, index, thread)
    elif job[0] == GATE:
        gate_chunk(zero, job, index)
    elif job[0] == ROTATE:
        rotate_chunk(zero, job, index)
    elif job[0] == QUANTIZE:
        quantize_chunk(zero, job, index)
    elif job[0] == INT8:
        int8_chunk(zero, job, index)
    else:
        attention_chunk(zero, job, index, thread)
