"""The differentiable attention for training: a right-padded batch, prefixes as plain tensors, no blocks.

Owns nothing but the arithmetic; gradients flow to the prefixes. Linear layers come from ``TorchKernels``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from prefixes.spec import Site

PrefixKV = Mapping[Site, tuple[torch.Tensor, torch.Tensor]]
"""Per site, keys and values ``(layers, prefix_len, kv_heads, head_dim)``."""


@dataclass(frozen=True)
class DenseAttention:
    """``Attention`` over a right-padded batch of ``batch`` sequences of ``length`` tokens, flattened.

    Every sequence attends to the same prefix; causal order keeps real tokens from seeing the padding behind them, so
    no padding mask is needed, and outputs at padding positions mean nothing.
    """

    batch: int
    length: int
    prefix: PrefixKV

    def __call__(
        self, site: Site, layer: int, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> torch.Tensor:
        assert key is not None and value is not None and site == "decoder", "GPT-2 has causal self-attention alone"
        q, k, v = (self._heads_first(x) for x in (query, key, value))
        mask = torch.ones(self.length, self.length, dtype=torch.bool, device=q.device).tril()
        if site in self.prefix:
            prefix_k, prefix_v = (x[layer].to(q.dtype).transpose(0, 1) for x in self.prefix[site])  # (heads, P, dim)
            k = torch.cat([prefix_k.expand(self.batch, -1, -1, -1), k], dim=2)
            v = torch.cat([prefix_v.expand(self.batch, -1, -1, -1), v], dim=2)
            mask = torch.cat([mask.new_ones(self.length, prefix_k.shape[1]), mask], dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(query.shape)

    def _heads_first(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.batch, self.length, *x.shape[1:]).transpose(1, 2)
