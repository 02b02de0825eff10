"""Makes random ragged batches over block tables, and computes the slow way what attention over them must give."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from server.engine.kernels.base import KVCache, PagedBatch, Scores


@dataclass(frozen=True)
class Row:
    """One row of a call: keys of segment 0, keys of segment 1 (the call's own included), tokens in the call, and how
    many keys of segment 0 stand at no position.
    """

    prefix: int
    own: int
    count: int
    unplaced: int = 0


@dataclass(frozen=True)
class Case:
    """A batch with its pool, and a fused ``qkv (tokens, 3, heads, head_dim)`` to take strided views of."""

    rows: list[Row]
    batch: PagedBatch
    cache: KVCache
    qkv: torch.Tensor


def make_case(
    rng: random.Random,
    rows: list[Row],
    *,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    heads: int = 3,
    kv_heads: int | None = None,
    head_dim: int = 16,
    layers: int = 2,
    causal: bool = True,
) -> Case:
    """Blocks in random order; every slot that no row owns holds NaN, so that reading one shows."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    spans = [(index, s, length) for index, row in enumerate(rows) for s, length in ((0, row.prefix), (1, row.own))]
    needed = [(index, segment, -(-length // block_size)) for index, segment, length in spans]
    blocks = sum(count for _, _, count in needed) + 2
    free = iter(rng.sample(range(blocks), blocks))
    tables = torch.zeros(len(rows), 2, max((count for _, _, count in needed), default=0) + 1, dtype=torch.int32)
    for index, segment, count in needed:
        tables[index, segment, :count] = torch.tensor([next(free) for _ in range(count)], dtype=torch.int32)
    shape = (layers, blocks, kv_heads or heads, block_size, head_dim)
    cache = KVCache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
    slots = []
    for index, segment, length in spans:
        for position in range(length):
            block, offset = int(tables[index, segment, position // block_size]), position % block_size
            for pool in (cache.keys, cache.values):
                pool[:, block, :, offset] = torch.randn(layers, shape[2], head_dim, dtype=dtype, generator=generator)
            if segment == 1 and position >= length - rows[index].count:
                slots.append(block * block_size + offset)
    counts = tuple(row.count for row in rows)
    batch = PagedBatch(
        tables=tables,
        lengths=torch.tensor([[row.prefix, row.own] for row in rows], dtype=torch.int32).reshape(-1, 2),
        unplaced=torch.tensor([row.unplaced for row in rows], dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int64),
        counts=counts,
        longest=(max((row.prefix for row in rows), default=0), max((row.own for row in rows), default=0)),
        causal=causal,
    )
    qkv = torch.randn(sum(counts), 3, heads, head_dim, dtype=dtype, generator=generator)
    return Case(rows, batch, cache, qkv)


def naive_attention(query: torch.Tensor, case: Case, layer: int, scores: Scores | None = None) -> torch.Tensor:
    """``(tokens, heads, head_dim)`` in float64: every token and head by itself, straight from the definition."""
    block_size = case.cache.block_size
    out = torch.zeros(query.shape, dtype=torch.float64)
    token = 0
    for index, row in enumerate(case.rows):
        for step in range(row.count):
            own = row.own - row.count + step + 1 if case.batch.causal else row.own
            places = [(0, position) for position in range(row.prefix)] + [(1, position) for position in range(own)]
            for head in range(query.shape[1] if places else 0):
                kv_head = head * case.cache.keys.shape[2] // query.shape[1]
                keys, values = (
                    torch.stack([
                        pool[layer, int(case.batch.tables[index, s, p // block_size]), kv_head, p % block_size].double()
                        for s, p in places
                    ])
                    for pool in (case.cache.keys, case.cache.values)
                )  # fmt: skip
                scored = keys @ query[token, head].double() * (scores.scale if scores else query.shape[2] ** -0.5)
                for key in range(row.unplaced, len(places) if scores and scores.bias is not None else 0):
                    scored[key] += bias_of(scores, head, key - (row.prefix + row.own - row.count + step))
                out[token, head] = torch.softmax(scored, dim=0) @ values
            token += 1
    return out


def bias_of(scores: Scores | None, head: int, distance: int) -> float:
    """What a key at ``distance`` behind the query adds, from the table as its docstring says."""
    assert scores is not None and scores.bias is not None
    reach = (scores.bias.shape[1] - 1) // 2
    return float(scores.bias[head, reach + min(max(distance, -reach), reach)])
