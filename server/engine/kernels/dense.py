"""The differentiable kernels for training: a right-padded batch, prefixes as plain tensors, no blocks.

Owns only the arithmetic; gradients flow to the prefixes alone. ``TorchKernels`` has what ``frozen.py`` has not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from prefixes.spec import Site
from server.engine.kernels.base import Activation, Linear, Norm, Scores
from server.engine.kernels.frozen import FrozenLinear, FrozenRmsNorm, GatedSilu, Rotation
from server.engine.kernels.torch_reference import TorchKernels, activate

PrefixKV = Mapping[Site, tuple[torch.Tensor, torch.Tensor]]
"""Per site, keys and values ``(layers, prefix_len, kv_heads, head_dim)``."""


class DenseKernels(TorchKernels):
    """``TorchKernels`` whose linear layers keep their weights in the dtype ``autocast``, if it is given.

    ``torch.autocast`` would cast a frozen weight at every use. Cast once, it needs no further cast.
    """

    name = "dense"

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        self._autocast = autocast

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation = "none") -> Linear:
        if self._autocast is not None:
            weight, bias = weight.to(self._autocast), None if bias is None else bias.to(self._autocast)
            return super().linear(weight, bias, activation)

        def frozen(x: torch.Tensor) -> torch.Tensor:
            return activate(FrozenLinear.apply(x, weight, bias), activation)

        return frozen

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> Linear:
        if activation != "silu":
            return super().gated(weight, bias, activation)
        linear = self.linear(weight, bias)

        def gated(x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = GatedSilu.apply(linear(x))
            return made

        return gated

    def rms_norm(self, weight: torch.Tensor, eps: float) -> Norm:
        if weight.dtype in (torch.float16, torch.bfloat16):  # sums in float32 have casts between
            return super().rms_norm(weight, eps)

        def norm(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            made: torch.Tensor = FrozenRmsNorm.apply(x if residual is None else x + residual, weight, eps)
            return made

        return norm

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = Rotation.apply(x, cos, sin)
        return made


@dataclass(frozen=True)
class DenseAttention:
    """``Attention`` over right-padded batches of ``batch`` sequences, flattened; every sequence has the same prefix.

    The decoder is causal: no real token sees the padding behind its row, so it needs no other mask. An encoder sees
    both ways: ``input_lengths (batch,)`` say which of its tokens, and which keys of cross-attention, are real. Outputs
    at padding positions mean nothing. ``scores`` are the model's; a prefix at the sites in ``unplaced`` stands at no
    position, as in ``PagedBatch``.
    """

    batch: int
    prefix: PrefixKV
    input_lengths: torch.Tensor | None = None
    scores: Mapping[Site, Scores] = field(default_factory=dict)
    unplaced: Collection[Site] = ()
    _stored: dict[tuple[Site, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _masks: dict[Site, torch.Tensor] = field(default_factory=dict)

    def __call__(
        self, site: Site, layer: int, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> torch.Tensor:
        own = (key, value) if key is not None and value is not None else self._stored[site, layer]
        q, k, v = (self._heads_first(x) for x in (query, *own))
        if site not in self._masks:
            self._masks[site] = self._mask(site, q, k)
        if site in self.prefix:
            prefix_k, prefix_v = (x[layer].to(q.dtype).transpose(0, 1) for x in self.prefix[site])  # (heads, P, dim)
            k = torch.cat([prefix_k.expand(self.batch, -1, -1, -1), k], dim=2)
            v = torch.cat([prefix_v.expand(self.batch, -1, -1, -1), v], dim=2)
        grouped, scale = q.shape[1] != k.shape[1], self.scores[site].scale if site in self.scores else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._masks[site], scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(query.shape)

    def store(self, site: Site, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._stored[site, layer] = (key, value)

    def _mask(self, site: Site, query: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """What to add to the scores, the same in every layer: the bias, or 0, where a token sees a key, else -inf.

        Keys are the prefix's, then the row's. ``(queries, keys)`` for the decoder, ``(batch, 1, 1, keys)`` for an
        encoder's; with a bias ``(batch or 1, heads, queries, keys)``.
        """
        queries, keys = query.shape[2], own.shape[2]
        if site == "decoder":
            seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        else:
            assert self.input_lengths is not None, "an encoder's rows have lengths"
            seen = (torch.arange(keys, device=query.device) < self.input_lengths[:, None])[:, None, None]
        length = self.prefix[site][0].shape[1] if site in self.prefix else 0
        seen = F.pad(seen, (length, 0), value=True)
        added = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        if site in self.scores and self.scores[site].bias is not None:
            positions = torch.arange(length + keys, device=query.device)
            added = self.scores[site].bias_at(positions - positions[length : length + queries, None]).to(query.dtype)
            if site in self.unplaced:
                added = added.masked_fill(positions < length, 0)
        return added.masked_fill(~seen, float("-inf"))

    def _heads_first(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.batch, -1, *x.shape[1:]).transpose(1, 2)
