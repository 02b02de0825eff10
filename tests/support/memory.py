"""How much memory a process has, and a bound for this one. Knows no test."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


def resident_mib(pid: int) -> int:
    """The process's resident memory."""
    return _status("VmRSS", str(pid)) // MIB


@contextmanager
def address_space_bounded(more: int) -> Iterator[None]:
    """Inside, this process may map ``more`` bytes beyond what it has mapped: a larger allocation fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize", "self") + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _status(name: str, pid: str) -> int:
    """A field of the process's status that is in kB, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name}")
