"""Our own threads for the kernels. They share out a job's chunks, and nobody waits for a thread that has none.

Owns the worker threads and the hand-over; knows of a job only its chunks. A parallel region of OpenMP ends when
every thread has arrived. Where another process holds a core, that is a scheduler quantum (milliseconds) later, for
nothing. Here the calling thread takes chunks itself until none is left, and then waits only for those that others hold.
Idle workers spin for some 250 microseconds, which bridges the gaps between a layer's calls, and then sleep.

The hand-over is one 64-bit ticket, ``job number | chunks | next chunk``. Taking a chunk is a compare-and-swap, which
fails for a thread that looked at an earlier job. A job's fields stay valid until its last chunk is done.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from server.engine.kernels.numba.emitter import I64
from server.engine.kernels.numba.jit import IS_X86, jit, types
from server.engine.kernels.numba.jobs import CHUNKS, JOB_FIELDS, MAX_CHUNKS, SHARED, Jobs, do_chunk
from server.engine.kernels.numba.tiles import pointer

SPINS = 10_000

# Offsets in the shared memory: one cache line for each word that several threads write, then mutex and conditions.
_TICKET, _DONE, _SLEEPERS, _CALLER_SLEEPS, _STOP, _JOB = range(0, 6 * 64, 64)
_MUTEX, _WORK, _FINISHED = range(6 * 64, 6 * 64 + 3 * 128, 128)
_MEMORY = 6 * 64 + 3 * 128
_INT64 = np.int64(0)

_i32, _i64 = types.int32, types.int64
_mutex_init = types.ExternalFunction("pthread_mutex_init", _i32(_i64, _i64))
_mutex_lock = types.ExternalFunction("pthread_mutex_lock", _i32(_i64))
_mutex_unlock = types.ExternalFunction("pthread_mutex_unlock", _i32(_i64))
_condition_init = types.ExternalFunction("pthread_cond_init", _i32(_i64, _i64))
_condition_wait = types.ExternalFunction("pthread_cond_wait", _i32(_i64, _i64))
_condition_broadcast = types.ExternalFunction("pthread_cond_broadcast", _i32(_i64))


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def _load(typing: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word(builder, arguments[0]), ordering="seq_cst", align=8)

    return _i64(_i64), emit


@intrinsic
def _store(typing: Any, address: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _word(builder, arguments[0]), ordering="seq_cst", align=8)
        return context.get_dummy_value()

    return types.void(_i64, _i64), emit


@intrinsic
def _add(typing: Any, address: Any, value: Any) -> Any:
    """Add atomically; returns the value before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return _i64(_i64, _i64), emit


@intrinsic
def _swap(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Compare and swap; returns whether it happened."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, expected, value = arguments
        result = builder.cmpxchg(_word(builder, target), expected, value, "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(_i64, _i64, _i64), emit


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if IS_X86:
            name = "llvm.x86.sse2.pause"
            builder.call(get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), name), [])
        return context.get_dummy_value()

    return types.void(), emit


@jit()
def _waiting(memory: int) -> Any:
    ticket = _load(memory + _TICKET)
    return (ticket & MAX_CHUNKS) < ((ticket >> 22) & MAX_CHUNKS)


@jit()
def _take(memory: int) -> Any:
    """The next chunk of the current job, or -1."""
    while True:
        ticket = _load(memory + _TICKET)
        index = ticket & MAX_CHUNKS
        if index >= (ticket >> 22) & MAX_CHUNKS:
            return -1
        if _swap(memory + _TICKET, ticket, ticket + 1):
            return index


@jit()
def _publish(memory: int, job: int, chunks: int) -> None:
    """Make ``job`` the current one and wake sleeping workers."""
    _store(memory + _JOB, job)
    _store(memory + _DONE, 0)
    number = (_load(memory + _TICKET) >> 44) + 1
    _store(memory + _TICKET, (number << 44) | (chunks << 22))
    if _load(memory + _SLEEPERS):
        _mutex_lock(memory + _MUTEX)
        _condition_broadcast(memory + _WORK)
        _mutex_unlock(memory + _MUTEX)


@jit()
def _wait_for_others(memory: int, spins: int) -> None:
    """Return when every chunk of the current job is done."""
    chunks = (_load(memory + _TICKET) >> 22) & MAX_CHUNKS
    for _ in range(spins):
        if _load(memory + _DONE) == chunks:
            return
        _pause()
    _mutex_lock(memory + _MUTEX)  # a worker lost its core: sleep, so that it can have ours
    _store(memory + _CALLER_SLEEPS, 1)
    while _load(memory + _DONE) < chunks:
        _condition_wait(memory + _FINISHED, memory + _MUTEX)
    _store(memory + _CALLER_SLEEPS, 0)
    _mutex_unlock(memory + _MUTEX)


@jit()
def _wait_for_work(memory: int, spins: int) -> Any:
    """Spin, then sleep, until there is a chunk to take; False when told to stop."""
    for _ in range(spins):
        if _waiting(memory):
            return True
        _pause()
    _mutex_lock(memory + _MUTEX)
    _add(memory + _SLEEPERS, 1)
    while not _waiting(memory) and _load(memory + _STOP) == 0:
        _condition_wait(memory + _WORK, memory + _MUTEX)
    _add(memory + _SLEEPERS, -1)
    _mutex_unlock(memory + _MUTEX)
    return _load(memory + _STOP) == 0


@jit()
def _finish(memory: int) -> None:
    """Count a chunk as done; wake the caller if it was the last one."""
    ticket = _load(memory + _TICKET)  # still this job's: its caller waits for this chunk
    last = _add(memory + _DONE, 1) + 1 == (ticket >> 22) & MAX_CHUNKS
    if last and _load(memory + _CALLER_SLEEPS):
        _mutex_lock(memory + _MUTEX)
        _condition_broadcast(memory + _FINISHED)
        _mutex_unlock(memory + _MUTEX)


@jit()
def _begin(shared: int, alone: int, jobs: Any, number: int) -> Any:
    """Make one of ``jobs (n, JOB_FIELDS)`` the current one; returns the memory where it is."""
    memory = shared if jobs[number, SHARED] else alone
    _publish(memory, jobs.ctypes.data + number * JOB_FIELDS * 8, jobs[number, CHUNKS])
    return memory


@jit()
def _run(zero: Any, shared: int, alone: int, jobs: Any, thread: int, spins: int) -> None:
    """Thread 0: run ``jobs`` in turn, each to its end. Any other: a worker's whole life (``jobs`` mean nothing)."""
    number, memory = 0, shared
    if thread == 0:
        memory = _begin(shared, alone, jobs, number)
    while True:
        index = _take(memory)
        if index >= 0:
            current = carray(pointer(_INT64, _load(memory + _JOB)), (JOB_FIELDS,))
            do_chunk(zero, current, index, thread)
            _finish(memory)
        elif thread == 0:
            _wait_for_others(memory, spins)
            number += 1
            if number == jobs.shape[0]:
                return
            memory = _begin(shared, alone, jobs, number)
        elif not _wait_for_work(memory, spins):
            return


@jit()
def _prepare(memory: int) -> None:
    _mutex_init(memory + _MUTEX, 0)
    _condition_init(memory + _WORK, 0)
    _condition_init(memory + _FINISHED, 0)


@jit()
def _stop(memory: int) -> None:
    _mutex_lock(memory + _MUTEX)
    _store(memory + _STOP, 1)
    _condition_broadcast(memory + _WORK)
    _mutex_unlock(memory + _MUTEX)


def _shut_down(memory: np.ndarray[Any, Any], address: int, threads: list[threading.Thread]) -> None:
    _stop(address)  # ``memory`` is an argument to stay alive until here
    for thread in threads:
        thread.join(timeout=1.0)


class WorkerPool:
    """``threads - 1`` workers beside the caller, for kernels of one float type. Ends with the object or the process.

    Compiles the kernels (or loads them from the cache on disk) when made: none is compiled later. After a fork the
    child has no workers; its jobs run in the calling thread.
    """

    def __init__(self, threads: int, dtype: np.dtype[Any], spins: int = SPINS) -> None:
        self.threads, self.zero = threads, dtype.type(0)
        self._spins, self._lock = spins, threading.Lock()
        memory = np.zeros(2 * _MEMORY // 8 + 8, np.int64)
        self._shared = -(-memory.ctypes.data // 64) * 64
        self._alone = self._shared + _MEMORY  # the same without workers
        _run.compile((from_dtype(dtype), _i64, _i64, types.int64[:, ::1], _i64, _i64))
        _prepare(self._shared)
        _prepare(self._alone)
        none = np.zeros((0, JOB_FIELDS), np.int64)
        self._workers = [
            threading.Thread(
                target=_run, args=(self.zero, self._shared, self._alone, none, index, spins),
                name=f"kernels-{index}", daemon=True,
            )
            for index in range(1, threads)
        ]  # fmt: skip
        for worker in self._workers:
            worker.start()
        self.close = weakref.finalize(self, _shut_down, memory, self._shared, self._workers)

    def run(self, jobs: Jobs) -> None:
        """Run at least one of ``jobs`` in turn, each to its end."""
        with self._lock:
            _run(self.zero, self._shared, self._alone, jobs, 0, self._spins)
