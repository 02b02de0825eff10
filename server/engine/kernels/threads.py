"""How many threads compute, and how they wait between two calls. Loads neither torch nor numba itself.

Two pools compute: our own for the kernels (``numba/pool.py``), and torch's (OpenMP) for what is left to torch. Both are
bounded to the cores, and torch's workers sleep while they wait. By default an OpenMP worker spins for milliseconds
after its region. Without a core to spare it holds the core that our kernels, the event loop or a client need, and each
hand-over costs a scheduler quantum. Our own workers spin for a quarter of a millisecond, and skip a job that they come
late to.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # "quota period" in microseconds, or "max period"
_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def available_cores(cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """Cores that this process may use: its affinity, bounded by the container's share of time; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = cgroup_limit.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no limit that we can read
    return max(cores, 1)


def configure_threads(threads: int | None = None) -> int:
    """Bound torch's pool to ``threads`` (None: all available cores) and let it wait asleep; returns the number.

    Call it once, before torch is imported: OpenMP reads its wait policy when it is loaded, and later only the number
    can be set. Environment variables that the user has set stay. Raises ValueError for fewer than one thread or more
    than the available cores.
    """
    cores = available_cores()
    if threads is not None and not 1 <= threads <= cores:
        raise ValueError(f"threads: expected 1 to {cores} (the available cores), got {threads}")
    count = threads or cores
    for name, value in {**_WAITING, "OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}.items():
        os.environ.setdefault(name, value)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)
    return count
