"""From scheduled rows to the tensors of a call: tokens, positions, and per site the tables that kernels read.

Owns the layout of a call; knows neither model nor pool.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from prefixes.spec import Site
from server.engine.kernels.base import PagedBatch
from server.engine.row import Group
from server.engine.scheduling.encoding import EncoderWork
from server.engine.scheduling.plan import ScheduledRow


@dataclass(frozen=True)
class DecoderCall:
    """One call of the decoder. Its rows' tokens are flattened, in the rows' order."""

    tokens: torch.Tensor  # (tokens,) int64
    positions: torch.Tensor  # (tokens,) int64
    batches: Mapping[Site, PagedBatch]
    wanted: torch.Tensor | None  # (n,) int64: the tokens that want logits; None: all do


@dataclass(frozen=True)
class _Context:
    """``count`` tokens of a call, and the blocks and lengths of the two segments that they attend to."""

    count: int
    prefix_blocks: Sequence[int]
    prefix_length: int
    unplaced: int  # keys of the prefix that stand at no position
    own_blocks: Sequence[int]
    own_length: int


def _context(group: Group, site: Site, count: int, blocks: Sequence[int], length: int) -> _Context:
    prefix = group.prefix_length(site)
    unplaced = prefix - group.position_offset(site)
    return _Context(count, group.prefix_blocks.get(site, ()), prefix, unplaced, blocks, length)


class BatchBuilder:
    """Builds calls for one block size and device."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._size, self._device = block_size, device

    def decoder(self, rows: Sequence[ScheduledRow]) -> DecoderCall:
        """The call over ``rows``. If their groups have an input, they attend to it at the ``cross`` site."""
        total = sum(row.count for row in rows)
        tokens, positions = np.empty(total, np.int64), np.empty(total, np.int64)
        contexts, wanted, begin = [], [], 0
        for scheduled in rows:
            group, row, start, end = scheduled.group, scheduled.row, scheduled.start, scheduled.end
            part, offset = slice(begin, begin + scheduled.count), group.position_offset("decoder")
            tokens[part] = row.token_ids[start:end]
            positions[part] = np.arange(start + offset, end + offset)
            contexts.append(_context(group, "decoder", scheduled.count, row.blocks, end))
            begin += scheduled.count
            if scheduled.wants_logits:
                wanted.append(begin - 1)
        batches: dict[Site, PagedBatch] = {"decoder": self._batch(contexts, causal=True)}
        if rows[0].group.input is not None:
            batches["cross"] = self._batch(self._cross(rows), causal=False, writes=False)
        chosen = None if len(wanted) == total else self._tensor(np.array(wanted, np.int64))
        return DecoderCall(self._tensor(tokens), self._tensor(positions), batches, chosen)

    def encoder(self, work: EncoderWork) -> PagedBatch:
        """The batch of a call over whole inputs. It serves the ``encoder`` site and what ``cross`` stores.

        An input's blocks hold the current encoder layer's keys and values until those of cross-attention replace them,
        at the same slots.
        """
        contexts = []
        for group, encoded in zip(work.groups, work.inputs, strict=True):
            length = len(encoded.token_ids)
            contexts.append(_context(group, "encoder", length, encoded.blocks, length))
        return self._batch(contexts, causal=False)

    def encoder_tokens(self, work: EncoderWork) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions of the inputs, flattened: what ``Encoder.embed`` takes."""
        tokens = [token for encoded in work.inputs for token in encoded.token_ids]
        positions = [
            np.arange(offset, offset + len(encoded.token_ids))
            for encoded, offset in zip(work.inputs, (g.position_offset("encoder") for g in work.groups), strict=True)
        ]
        return self._tensor(np.array(tokens, np.int64)), self._tensor(np.concatenate(positions))

    def _cross(self, rows: Sequence[ScheduledRow]) -> list[_Context]:
        """The rows' contexts at ``cross``: one for each group's rows, so that its input is read once."""
        contexts = []
        for group, members in itertools.groupby(rows, key=lambda row: row.group):
            assert group.input is not None and group.input.complete
            count = sum(row.count for row in members)
            contexts.append(_context(group, "cross", count, group.input.blocks, len(group.input.token_ids)))
        return contexts

    def _batch(self, contexts: Sequence[_Context], *, causal: bool, writes: bool = True) -> PagedBatch:
        """The contexts as tables. ``slots`` are for the last ``count`` own tokens of each; none without ``writes``."""
        counts, size = tuple(context.count for context in contexts), self._size
        longest = max(max(len(context.own_blocks), len(context.prefix_blocks)) for context in contexts)
        tables = np.zeros((len(contexts), 2, longest), np.int32)
        lengths = np.empty((len(contexts), 2), np.int32)
        slots = np.empty(sum(counts) if writes else 0, np.int64)
        begin = 0
        for index, context in enumerate(contexts):
            tables[index, 0, : len(context.prefix_blocks)] = context.prefix_blocks
            tables[index, 1, : len(context.own_blocks)] = context.own_blocks
            lengths[index] = context.prefix_length, context.own_length
            if writes:
                end = begin + context.count
                places = np.arange(context.own_length - context.count, context.own_length)
                slots[begin:end] = tables[index, 1][places // size] * np.int64(size) + places % size
                begin = end
        return PagedBatch(
            tables=self._tensor(tables),
            lengths=self._tensor(lengths),
            unplaced=self._tensor(np.array([context.unplaced for context in contexts], np.int32)),
            slots=self._tensor(slots),
            counts=counts,
            longest=(int(lengths[:, 0].max()), int(lengths[:, 1].max())),
            causal=causal,
        )

    def _tensor(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
