"""Weights in panels, the order in which tiles read them, on huge pages where the system gives some.

Owns their memory, as they are or as int8; knows no layer.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from server.engine.kernels.numba.tiles import PANEL_BYTES

HUGE_PAGE = 2 << 20
PANELS_AT_ONCE = 256  # are rounded together: a whole head in float32 would be there twice meanwhile


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

    def rows_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """The weight's rows of ``outputs (n,)``: ``(n, in)``."""
        lanes = self.packed.shape[2]
        return self.packed[outputs // lanes, :, outputs % lanes]


@dataclass(frozen=True)
class Int8Panels:
    """``packed (panels, pairs, lanes, 2)``: of each ``lanes`` outputs, as many as in float panels, pairs of inputs.

    An output's weights are ``scales (panels * lanes,)`` times their integers, of which the greatest is 127. What there
    is beyond ``outs``, or beyond ``count`` inputs, is zero.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    outs: int
    count: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Panels:
        """Those of ``weight (out, in)``, rounded."""
        outs, count = weight.shape
        lanes, pairs = PANEL_BYTES // weight.element_size(), -(-count // 2)
        panels = -(-outs // lanes)
        packed = torch.from_numpy(_zeros(panels * pairs * lanes * 2)).view(torch.int8).view(panels, pairs, lanes, 2)
        scales = torch.zeros(panels * lanes, dtype=weight.dtype)
        for first in range(0, panels, PANELS_AT_ONCE):
            part = weight[first * lanes : (first + PANELS_AT_ONCE) * lanes]
            integers, scale = quantized(part)
            scales[first * lanes : first * lanes + part.shape[0]] = scale
            made = -(-part.shape[0] // lanes)
            whole = torch.zeros(made * lanes, pairs * 2, dtype=torch.int8)
            whole[: part.shape[0], :count] = integers
            packed[first : first + made] = whole.view(made, lanes, pairs, 2).transpose(1, 2)
        return cls(packed, scales, outs, count)

    def rows_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """The weight's rows of ``outputs (n,)`` as they were rounded: ``(n, in)``."""
        lanes = self.packed.shape[2]
        integers = self.packed[outputs // lanes, :, outputs % lanes].flatten(1)  # (n, in, or one more)
        return integers[:, : self.count].to(self.scales.dtype) * self.scales[outputs, None]


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight (out, in)`` as int8, symmetric, and a scale for each output, in which the greatest is 127."""
    scales = weight.abs().amax(dim=1) / 127 if weight.shape[1] else weight.new_zeros(weight.shape[0])
    integers = (weight / scales.where(scales != 0, scales.new_ones(()))[:, None]).round_().clamp_(-127, 127)
    return integers.to(torch.int8), scales


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
