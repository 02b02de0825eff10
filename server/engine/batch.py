"""From rows' contexts to the tables that kernels read. Knows neither model nor requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from server.engine.kernels.base import PagedBatch


@dataclass(frozen=True)
class RowContext:
    """``count`` tokens of a call, and the two segments that they attend to.

    Where the tokens' own keys are part of the context they stand at the end of ``own_blocks``' ``own_length``.
    """

    count: int
    prefix_blocks: Sequence[int]
    prefix_length: int
    own_blocks: Sequence[int]
    own_length: int


class Tables:
    """Makes ``PagedBatch``es for one block size and device."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._size, self._device = block_size, device

    def batch(self, rows: Sequence[RowContext], *, causal: bool, writes: bool = True) -> PagedBatch:
        """The rows as tables. With ``writes``, slots are those of each row's last ``count`` own tokens, else none."""
        counts, size = tuple(row.count for row in rows), self._size
        longest = max(max(len(row.own_blocks), len(row.prefix_blocks)) for row in rows)
        tables = np.zeros((len(rows), 2, longest), np.int32)
        lengths = np.empty((len(rows), 2), np.int32)
        slots = np.empty(sum(counts) if writes else 0, np.int64)
        begin = 0
        for index, row in enumerate(rows):
            tables[index, 0, : len(row.prefix_blocks)] = row.prefix_blocks
            tables[index, 1, : len(row.own_blocks)] = row.own_blocks
            lengths[index] = row.prefix_length, row.own_length
            if writes:
                places = np.arange(row.own_length - row.count, row.own_length)
                slots[begin : begin + row.count] = tables[index, 1][places // size] * np.int64(size) + places % size
                begin += row.count
        return PagedBatch(
            tables=self.tensor(tables),
            lengths=self.tensor(lengths),
            slots=self.tensor(slots),
            counts=counts,
            longest=(int(lengths[:, 0].max()), int(lengths[:, 1].max())),
            causal=causal,
        )

    def tensor(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
        """The array on the device."""
        return torch.from_numpy(array).to(self._device, non_blocking=True)
