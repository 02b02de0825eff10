"""Weights in panels, the order in which ``panel_tile`` reads them, on huge pages where the system gives some.

Owns their memory; knows no layer.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from server.engine.kernels.numba.tiles import PANEL_BYTES

HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class Panels:
    """``packed (panels, in, lanes)``: of each ``lanes`` outputs the weights of one input after another.

    What the last panel has beyond ``outs`` is zero.
    """

    packed: torch.Tensor
    outs: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Panels:
        """Those of ``weight (out, in)``, copied."""
        weight, (outs, count) = weight.contiguous(), weight.shape
        lanes = PANEL_BYTES // weight.element_size()
        panels, whole = -(-outs // lanes), outs // lanes
        packed = torch.from_numpy(_zeros(panels * count * PANEL_BYTES)).view(weight.dtype).view(panels, count, lanes)
        packed[:whole] = weight[: whole * lanes].view(whole, lanes, count).transpose(1, 2)
        if whole < panels:
            packed[whole, :, : outs - whole * lanes] = weight[whole * lanes :].t()
        return cls(packed, outs)


def _zeros(size: int) -> np.ndarray[Any, Any]:
    """So many bytes, from a page's begin. Of several megabytes on ordinary pages, half of the time is lookups."""
    if size < HUGE_PAGE:
        return np.zeros(size, np.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    begin = -whole.ctypes.data % HUGE_PAGE
    return whole[begin : begin + size]
