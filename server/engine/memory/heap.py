"""Gives freed memory that the C library keeps back to the system.

glibc's threads have arenas of their own. What a thread takes in pieces of up to 32 MiB and frees, such as an artifact's
tensors, stays in its arena for that thread. Threads that read an artifact now and then would together keep the memory
of several artifacts for ever.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _found() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc
        return None
    return trim


_trim = _found()


def trim_heap() -> None:
    """Return freed memory to the system, where the C library can: some 0.06 ms per MiB.

    Runs without the interpreter's lock, but a thread that allocates in the same arena waits meanwhile.
    """
    if _trim is not None:
        _trim(0)
