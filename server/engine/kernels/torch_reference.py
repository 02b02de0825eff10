"""The reference kernel set: plain torch, any device, any float dtype.

Owns correctness, not speed: other kernel sets are tested against it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from server.engine.kernels.base import Activation, KVCache, Linear, Norm, PagedBatch

LONG_QUERY = 8  # rows with at least so many tokens in a call attend one by one, without padding to the longest


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply ``activation``; ``gelu_new`` is the tanh approximation that GPT-2 was trained with."""
    if activation == "gelu_new":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu":
        return F.gelu(x)
    if activation == "relu":
        return F.relu(x)
    return x


class TorchKernels:
    """Linear layers by ``F.linear``, attention by gathering blocks into contiguous keys and SDPA."""

    name = "torch"

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation = "none") -> Linear:
        return lambda x: activate(F.linear(x, weight, bias), activation)

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
        def norm(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, eps)

        return norm

    def top_log_probs(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, ids = torch.topk(torch.log_softmax(logits, dim=1), count)
        return values, ids

    def write_kv(
        self, cache: KVCache, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        block, offset = slots // cache.block_size, slots % cache.block_size
        cache.keys[layer][block, :, offset] = key
        cache.values[layer][block, :, offset] = value

    def paged_attention(self, query: torch.Tensor, cache: KVCache, layer: int, batch: PagedBatch) -> torch.Tensor:
        out = torch.empty_like(query)
        counts = batch.counts
        starts = [0, *itertools.accumulate(counts)]
        for count in sorted({c for c in counts if 0 < c < LONG_QUERY}):
            rows = [r for r, c in enumerate(counts) if c == count]
            self._attend(out, query, cache, layer, batch, rows, [starts[r] for r in rows], count)
        for row, count in enumerate(counts):
            if count >= LONG_QUERY:
                self._attend(out, query, cache, layer, batch, [row], [starts[row]], count)
        return out

    def warm_up(self, seconds: float = 2.0) -> None:
        """Nothing to measure."""

    def _attend(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        cache: KVCache,
        layer: int,
        batch: PagedBatch,
        rows: list[int],
        starts: list[int],
        count: int,
    ) -> None:
        """Rows with the same number of tokens, padded to the longest context of each segment."""
        device = query.device
        select = torch.tensor(rows, device=device)
        tokens = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)  # (rows, count)
        lengths = batch.lengths[select].long()  # (rows, 2)
        keys, values, visible = [], [], []
        for segment in (0, 1):
            longest = batch.longest[segment]
            if longest == 0:
                continue
            blocks = -(-longest // cache.block_size)
            table = batch.tables[select, segment, :blocks].long()  # (rows, blocks)
            filled = torch.arange(longest, device=device) < lengths[:, segment, None]  # (rows, longest)
            # Behind a row's end stands whatever the block's last user left. SDPA adds its mask to the scores and
            # multiplies masked values by 0: a NaN there would become the row's own.
            empty = ~filled[:, None, :, None]
            keys.append(_gather(cache.keys[layer], table)[:, :, :longest].masked_fill(empty, 0))
            values.append(_gather(cache.values[layer], table)[:, :, :longest].masked_fill(empty, 0))
            limit = lengths[:, segment, None].expand(-1, count)  # (rows, count): keys each token may see
            if segment == 1 and batch.causal:
                limit = limit - count + 1 + torch.arange(count, device=device)
            visible.append(torch.arange(longest, device=device) < limit[:, :, None])
        attended = F.scaled_dot_product_attention(
            query[tokens].transpose(1, 2),  # (rows, heads, count, head_dim)
            torch.cat(keys, dim=2),
            torch.cat(values, dim=2),
            attn_mask=torch.cat(visible, dim=2)[:, None],
            enable_gqa=keys[0].shape[1] != query.shape[1],
        )
        out[tokens] = attended.transpose(1, 2)


def _gather(pool: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``(blocks, heads, block_size, head_dim)`` by ``(rows, n)`` -> ``(rows, heads, n * block_size, head_dim)``."""
    rows, count = table.shape
    _, heads, size, dim = pool.shape
    return pool[table].transpose(1, 2).reshape(rows, heads, count * size, dim)
