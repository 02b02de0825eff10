"""What the machine raises when it has no more memory or disk, as the errors that a user is told.

Owns how such failures are recognised; knows no training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from trainer.data.errors import NO_ROOM, DiskFull, OutOfMemory

ALLOCATOR_TEXTS: Final = ("can't allocate memory", "not enough memory", "out of memory")
"""torch's allocators raise a plain RuntimeError on the CPU: its text on Linux, on Windows, and of a device's driver."""


@contextmanager
def named_failures(advice: str) -> Iterator[None]:
    """OutOfMemory, which ends in ``advice``, and DiskFull in place of what Python and torch raise."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # torch's text goes on for lines, with addresses of its own code.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise OutOfMemory(f"expected enough memory for the run, got: {reason}; {advice}") from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        # The path stays in the error's cause: folders of the machine are nobody's business.
        raise DiskFull(f"expected room on the disk for the run's files, got: {error.strerror}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in ALLOCATOR_TEXTS)
