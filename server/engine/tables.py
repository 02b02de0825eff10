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

    def batch(self, rows: Sequence[RowContext], *, causal: bool) -> PagedBatch:
        """The rows as tables. Slots are those of each row's last ``count`` own tokens."""
        counts, size = tuple(row.count for row in rows), self._size
        longest = max(max(len(row.own_blocks), len(row.prefix_blocks)) for row in rows)
        tables = np.zeros((len(rows), 2, longest), np.int32)
        lengths = np.empty((len(rows), 2), np.int32)
        slots = np.empty(sum(counts), np.int64)
        begin = 0
        for index, row in enumerate(rows):
            tables[index, 0, : len(row.prefix_blocks)] = row.prefix_blocks
            tables[index, 1, : len(row.own_blocks)] = row.own_blocks
            lengths[index] = row.prefix_length, row.own_length
            places = np.arange(max(0, row.own_length - row.count), row.own_length)
            slots[begin : begin + len(places)] = tables[index, 1][places // size] * np.int64(size) + places % size
            begin += len(places)
        return PagedBatch(
            query_start=self._tensor(np.concatenate(([0], np.cumsum(counts))).astype(np.int32)),
            tables=self._tensor(tables),
            lengths=self._tensor(lengths),
            slots=self._tensor(slots[:begin]),
            counts=counts,
            longest=(int(lengths[:, 0].max()), int(lengths[:, 1].max())),
            causal=causal,
        )

    def _tensor(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
