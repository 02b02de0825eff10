"""Runs the same function in several processes at once. They are forks, so they need not import torch again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("fork")


def in_processes(count: int, target: Callable[..., None], *args: Any) -> list[int | None]:
    """Call ``target(index, *args)`` in ``count`` processes; their exit codes, None for one that is still at work."""
    processes = [FORK.Process(target=target, args=(index, *args)) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]
