"""Rows to tensors to logits: the one place that calls the model for serving.

Owns the block pool's tensors, the model and the count of forward calls; knows no requests beyond the rows it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.kernels.base import Kernels, KVCache, PagedAttention, PagedBatch
from server.engine.models import load_model
from server.engine.prefix_store import SiteBlocks
from server.engine.scheduler import ScheduledRow


class Runner:
    """One backbone's model over one pool of blocks."""

    def __init__(self, backbone: Backbone, kernels: Kernels, config: EngineConfig) -> None:
        weight = next(backbone.model.parameters())
        geometry = backbone.spec.sites["decoder"]
        self._device, self._dtype, self._block_size = weight.device, weight.dtype, config.block_size
        self._model, self._kernels = load_model(backbone, kernels), kernels
        per_token = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * self._dtype.itemsize
        self.bytes_per_block = per_token * config.block_size
        self.blocks = config.kv_cache_bytes // self.bytes_per_block
        shape = (geometry.layers, max(self.blocks, 2), geometry.kv_heads, config.block_size, geometry.head_dim)
        # Zeroed memory is mapped when it is first touched, so that an idle server takes what it uses.
        self._cache = KVCache(
            torch.zeros(shape, dtype=self._dtype, device=self._device),
            torch.zeros(shape, dtype=self._dtype, device=self._device),
        )
        self.forwards: Counter[str] = Counter()

    def write_prefix(self, prefix: Prefix, blocks: SiteBlocks) -> None:
        """Write ``prefix``, cast to the backbone's dtype, into its blocks."""
        for site, taken in blocks.items():
            for name, pool in (("key", self._cache.keys), ("value", self._cache.values)):
                tensor = prefix.tensors[f"{site}.{name}"].to(self._device, self._dtype)  # (layers, length, heads, dim)
                for index, block in enumerate(taken):
                    part = tensor[:, index * self._block_size : (index + 1) * self._block_size]
                    pool[:, block, :, : part.shape[1]] = part.transpose(1, 2)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy each source block to its target, all layers."""
        if copies:
            sources, targets = (list(blocks) for blocks in zip(*copies, strict=True))
            for pool in (self._cache.keys, self._cache.values):
                pool[:, targets] = pool[:, sources]

    @torch.inference_mode()
    def decoder(self, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        """One call of the decoder over ``rows``; float32 logits ``(n, vocab)`` of those that want them, in order."""
        self.forwards["decoder"] += 1
        tokens, positions, batch = self._batch(rows)
        attention = PagedAttention(self._kernels, {"decoder": self._cache}, {"decoder": batch})
        hidden = self._model.decoder(tokens, positions, attention)
        ends = np.cumsum(batch.counts) - 1
        last = [int(end) for end, row in zip(ends, rows, strict=True) if row.wants_logits]
        if not last:
            return hidden.new_empty((0, 0), dtype=torch.float32)
        wanted = hidden if len(last) == hidden.shape[0] else hidden[torch.tensor(last, device=self._device)]
        return self._model.logits(wanted).float()

    def _batch(self, rows: Sequence[ScheduledRow]) -> tuple[torch.Tensor, torch.Tensor, PagedBatch]:
        counts = tuple(row.count for row in rows)
        total, size = sum(counts), self._block_size
        longest = max(max(len(row.sequence.blocks), len(row.group.prefix_blocks)) for row in rows)
        tokens = np.empty(total, np.int64)
        own = np.empty(total, np.int64)  # each token's index among its row's own tokens
        offsets = np.empty(total, np.int64)
        slots = np.empty(total, np.int64)
        tables = np.zeros((len(rows), 2, longest), np.int32)
        lengths = np.empty((len(rows), 2), np.int32)
        begin = 0
        for index, row in enumerate(rows):
            sequence, end, part = row.sequence, row.start + row.count, slice(begin, begin + row.count)
            tables[index, 0, : len(row.group.prefix_blocks)] = row.group.prefix_blocks
            tables[index, 1, : len(sequence.blocks)] = sequence.blocks
            lengths[index] = row.group.prefix_length, end
            tokens[part] = sequence.token_ids[row.start : end]
            own[part] = np.arange(row.start, end)
            offsets[part] = row.group.position_offset
            slots[part] = tables[index, 1][own[part] // size] * size + own[part] % size
            begin += row.count
        batch = PagedBatch(
            query_start=self._tensor(np.concatenate(([0], np.cumsum(counts))).astype(np.int32)),
            tables=self._tensor(tables),
            lengths=self._tensor(lengths),
            slots=self._tensor(slots),
            counts=counts,
            longest=(int(lengths[:, 0].max()), int(lengths[:, 1].max())),
        )
        return self._tensor(tokens), self._tensor(own + offsets), batch

    def _tensor(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
