"""The reference kernel set: plain torch, any device, any float dtype.

Owns correctness, not speed: other kernel sets are tested against it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from server.engine.kernels.base import Activation, Embedding, Gated, KVCache, Linear, Norm, PagedBatch, Scores

LONG_QUERY = 8  # a row with at least this many tokens in a call attends alone; shorter rows of equal count together


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply ``activation``; ``gelu_new`` is the tanh approximation that GPT-2 was trained with."""
    if activation == "gelu_new":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu":
        return F.gelu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return x


class _SameCount:
    """Rows with the same number of tokens in a call, padded to the whole batch's longest context of each segment."""

    def __init__(
        self,
        cache: KVCache,
        batch: PagedBatch,
        scores: Scores | None,
        rows: list[int],
        starts: list[int],
        count: int,
    ) -> None:
        device = batch.tables.device
        select, steps = torch.tensor(rows, device=device), torch.arange(count, device=device)
        self._tokens = torch.tensor(starts, device=device)[:, None] + steps  # (rows, count)
        self._segments: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each: blocks, and which places are empty
        lengths, visible, keys = batch.lengths[select].long(), [], []  # (rows, 2)
        for segment, longest in enumerate(batch.longest):
            if longest == 0:
                continue
            places = torch.arange(longest, device=device)
            table = batch.tables[select, segment, : -(-longest // cache.block_size)].long()  # (rows, blocks)
            self._segments.append((table, (places >= lengths[:, segment, None])[:, None, :, None]))
            limit = lengths[:, segment, None].expand(-1, count)  # (rows, count): keys each token may see
            if segment == 1 and batch.causal:
                limit = limit - count + 1 + steps
            visible.append(places < limit[:, :, None])
            keys.append(places + segment * lengths[:, :1])  # (rows, longest): their positions
        self._mask = torch.cat(visible, dim=2)[:, None]  # (rows, 1, count, keys)
        self._scale = None if scores is None else scores.scale
        if scores is not None and scores.bias is not None:
            positions, first = torch.cat(keys, dim=1), lengths.sum(dim=1, keepdim=True) - count
            bias = scores.bias_at(positions[:, None] - (first + steps)[:, :, None])  # (heads, rows, count, keys)
            unplaced = positions[:, None] < batch.unplaced[select, None, None]
            self._mask = bias.masked_fill(unplaced, 0).transpose(0, 1).masked_fill(~self._mask, float("-inf"))

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """Attend to a layer's ``keys`` and ``values``, ``(blocks, kv_heads, block_size, head_dim)``, into ``out``."""
        attended = F.scaled_dot_product_attention(
            query[self._tokens].transpose(1, 2),  # (rows, heads, count, head_dim)
            self._contexts(keys),
            self._contexts(values),
            attn_mask=self._mask,
            scale=self._scale,
            enable_gqa=keys.shape[1] != query.shape[1],
        )
        out[self._tokens] = attended.transpose(1, 2)

    def _contexts(self, pool: torch.Tensor) -> torch.Tensor:
        """The rows' two segments one behind the other, ``(rows, kv_heads, keys, head_dim)``."""
        # Behind a row's end, a block holds what its last user left. SDPA adds its mask to the scores and multiplies
        # masked values by 0, so a NaN there would reach the row.
        return torch.cat(
            [_gather(pool, table)[:, :, : empty.shape[2]].masked_fill(empty, 0) for table, empty in self._segments],
            dim=2,
        )


class TorchBatch:
    """See ``base.PreparedBatch``: index tensors and masks, the same in every layer."""

    def __init__(self, cache: KVCache, batch: PagedBatch, scores: Scores | None) -> None:
        self._cache = cache
        self._block, self._offset = batch.slots // cache.block_size, batch.slots % cache.block_size
        counts, starts = batch.counts, [0, *itertools.accumulate(batch.counts)]
        short = sorted({count for count in counts if 0 < count < LONG_QUERY})
        together = [[row for row, count in enumerate(counts) if count == same] for same in short]
        alone = [[row] for row, count in enumerate(counts) if count >= LONG_QUERY]
        self._parts = [
            _SameCount(cache, batch, scores, rows, [starts[row] for row in rows], counts[rows[0]])
            for rows in (*together, *alone)
        ]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._cache.keys[layer][self._block, :, self._offset] = key
        self._cache.values[layer][self._block, :, self._offset] = value

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        for part in self._parts:
            part.attend(query, self._cache.keys[layer], self._cache.values[layer], out)
        return out


class TorchKernels:
    """Linear layers by ``F.linear``, attention by gathering blocks into contiguous keys and SDPA."""

    name = "torch"

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation = "none") -> Linear:
        def linear(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            made = activate(F.linear(x, weight, bias), activation)
            return made if residual is None else residual + made

        return linear

    def embedding(self, weight: torch.Tensor, head: Linear | None) -> Embedding:
        return lambda ids: F.embedding(ids, weight)

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> Gated:
        linear = self.linear(weight, bias)

        def gated(x: torch.Tensor) -> torch.Tensor:
            gate, other = linear(x).chunk(2, dim=-1)
            return activate(gate, activation) * other

        return gated

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
        def norm(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, eps)

        return norm

    def rms_norm(self, weight: torch.Tensor, eps: float) -> Norm:
        def norm(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            x = x if residual is None else x + residual
            # In half precision, squares and sums are float32, as in transformers; the product with the weight is not.
            wide = x if x.dtype == torch.float64 else x.float()
            return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

        return norm

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def top_log_probs(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, ids = torch.topk(torch.log_softmax(logits, dim=1), count)
        return values, ids

    def prepare(self, cache: KVCache, batch: PagedBatch, scores: Scores | None = None) -> TorchBatch:
        return TorchBatch(cache, batch, scores)


def _gather(pool: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``(blocks, heads, block_size, head_dim)`` by ``(rows, n)`` -> ``(rows, heads, n * block_size, head_dim)``."""
    rows, count = table.shape
    _, heads, size, dim = pool.shape
    return pool[table].transpose(1, 2).reshape(rows, heads, count * size, dim)
