"""The differentiable attention for training: a right-padded batch, prefixes as plain tensors, no blocks.

Owns nothing but the arithmetic; gradients flow to the prefixes. Linear layers come from ``TorchKernels``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from prefixes.spec import Site

PrefixKV = Mapping[Site, tuple[torch.Tensor, torch.Tensor]]
"""Per site, keys and values ``(layers, prefix_len, kv_heads, head_dim)``."""


@dataclass(frozen=True)
class DenseAttention:
    """``Attention`` over right-padded batches of ``batch`` sequences, flattened; every sequence has the same prefix.

    The decoder's own order is causal and hides the padding behind a row from every real token, so that it needs no
    mask; an encoder sees all ways, and ``input_lengths (batch,)`` say which of its tokens, and which keys of
    cross-attention, are real. Outputs at padding positions mean nothing.
    """

    batch: int
    prefix: PrefixKV
    input_lengths: torch.Tensor | None = None
    _stored: dict[tuple[Site, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __call__(
        self, site: Site, layer: int, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> torch.Tensor:
        own = (key, value) if key is not None and value is not None else self._stored[site, layer]
        q, k, v = (self._heads_first(x) for x in (query, *own))
        mask = self._mask(site, q.shape[2], k.shape[2], q.device)
        if site in self.prefix:
            prefix_k, prefix_v = (x[layer].to(q.dtype).transpose(0, 1) for x in self.prefix[site])  # (heads, P, dim)
            k = torch.cat([prefix_k.expand(self.batch, -1, -1, -1), k], dim=2)
            v = torch.cat([prefix_v.expand(self.batch, -1, -1, -1), v], dim=2)
            mask = F.pad(mask, (prefix_k.shape[1], 0), value=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(query.shape)

    def store(self, site: Site, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._stored[site, layer] = (key, value)

    def _mask(self, site: Site, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """Which of a row's own keys its tokens see, ``(queries, keys)`` or ``(batch, 1, 1, keys)``."""
        if site == "decoder":
            return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        assert self.input_lengths is not None, "an encoder's rows have lengths"
        return (torch.arange(keys, device=device) < self.input_lengths[:, None])[:, None, None]

    def _heads_first(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.batch, -1, *x.shape[1:]).transpose(1, 2)
