"""Turns errors of exhausted memory or disk into named errors.

Owns how such failures are recognised; knows no training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from prefixes.errors import NO_ROOM, DiskFull
from trainer.data.errors import OutOfMemory

ALLOCATOR_TEXTS: Final = ("can't allocate memory", "not enough memory", "out of memory")
"""Parts of the RuntimeError texts of torch's allocators: on Linux, on Windows, and from a device's driver."""


@contextmanager
def named_failures(advice: str) -> Iterator[None]:
    """Raise OutOfMemory, with ``advice`` at its end, or DiskFull in place of Python's and torch's errors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # torch's text has many lines, with addresses of its code: only the first is kept.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise OutOfMemory(f"expected enough memory for the run, got: {reason}; {advice}") from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        # The message leaves the path out: it may be shown to other users. The error's cause has it.
        raise DiskFull(f"expected room on the disk for the run's files, got: {error.strerror}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in ALLOCATOR_TEXTS)
