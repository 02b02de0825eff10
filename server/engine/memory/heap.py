"""Giving freed memory back to the system, where the C library keeps it.

glibc's threads have arenas of their own: what a thread took in pieces of up to 32 MiB and freed, such as an artifact's
tensors, stays there for what that thread takes next. Threads that read an artifact now and then would hold several
artifacts' worth between them for ever, beside what the engine computes with.
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
    """Return what has been freed to the system, if that can be done: some 0.06 ms per MiB.

    Without the interpreter's lock; yet whoever allocates in the arena at hand meanwhile waits.
    """
    if _trim is not None:
        _trim(0)
