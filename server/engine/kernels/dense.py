"""The differentiable kernels for training: ragged rows, prefixes as plain tensors, no blocks.

Owns only the arithmetic; gradients flow to the prefixes alone. ``TorchKernels`` has what ``frozen.py`` has not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from prefixes.spec import Site
from server.engine.kernels.base import Activation, Gated, Linear, Norm, Scores
from server.engine.kernels.frozen import FrozenLinear, FrozenRmsNorm, GatedSilu, Gather, Rotation, Scatter
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

        def frozen(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            made = activate(FrozenLinear.apply(x, weight, bias), activation)
            return made if residual is None else residual + made

        return frozen

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> Gated:
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


class _Rows:
    """Rows of ``lengths`` tokens, one behind the other, and the same on a grid, padded with zeros on the right."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count, self.longest = len(lengths), max(lengths)
        self.lengths = torch.tensor(lengths, device=device)
        on_grid = torch.arange(self.longest, device=device) < self.lengths[:, None]
        self._places = on_grid.flatten().nonzero()[:, 0]  # (tokens,): of each token on the flattened grid

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, heads, head_dim)`` -> ``(rows, heads, longest, head_dim)``."""
        grid: torch.Tensor = Scatter.apply(x, self._places, self.count * self.longest)
        return grid.view(self.count, self.longest, *x.shape[1:]).transpose(1, 2)

    def unpad(self, grid: torch.Tensor) -> torch.Tensor:
        """``pad`` back."""
        made: torch.Tensor = Gather.apply(grid.transpose(1, 2).flatten(0, 1), self._places)
        return made


@dataclass(frozen=True)
class DenseAttention:
    """``Attention`` over rows of ``lengths`` tokens; every row has the same prefix.

    Only attention pads. The decoder is causal: no real token sees the padding behind its row, so it needs no other
    mask. An encoder sees both ways: ``input_lengths`` are of what it reads, whose keys cross-attention has too.
    ``scores`` are the model's; a prefix at the sites in ``unplaced`` stands at no position, as in ``PagedBatch``.
    """

    lengths: Sequence[int]
    prefix: PrefixKV
    input_lengths: Sequence[int] | None = None
    scores: Mapping[Site, Scores] = field(default_factory=dict)
    unplaced: Collection[Site] = ()
    _stored: dict[tuple[Site, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _masks: dict[Site, torch.Tensor] = field(default_factory=dict)
    _rows: dict[bool, _Rows] = field(default_factory=dict)

    def __call__(
        self, site: Site, layer: int, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> torch.Tensor:
        own = (key, value) if key is not None and value is not None else self._stored[site, layer]
        rows, keyed = self._of(site == "encoder", query.device), self._of(site != "decoder", query.device)
        q, k, v = rows.pad(query), keyed.pad(own[0]), keyed.pad(own[1])
        if site not in self._masks:
            self._masks[site] = self._mask(site, q, keyed)
        if site in self.prefix:
            prefix_k, prefix_v = (x[layer].to(q.dtype).transpose(0, 1) for x in self.prefix[site])  # (heads, P, dim)
            k = torch.cat([prefix_k.expand(keyed.count, -1, -1, -1), k], dim=2)
            v = torch.cat([prefix_v.expand(keyed.count, -1, -1, -1), v], dim=2)
        grouped, scale = q.shape[1] != k.shape[1], self.scores[site].scale if site in self.scores else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._masks[site], scale=scale, enable_gqa=grouped)
        return rows.unpad(out)

    def store(self, site: Site, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._stored[site, layer] = (key, value)

    def _of(self, inputs: bool, device: torch.device) -> _Rows:
        """The rows of what the encoder reads, or of the decoder's."""
        if inputs not in self._rows:
            lengths = self.input_lengths if inputs else self.lengths
            assert lengths is not None, "an encoder's rows have lengths"
            self._rows[inputs] = _Rows(lengths, device)
        return self._rows[inputs]

    def _mask(self, site: Site, query: torch.Tensor, keyed: _Rows) -> torch.Tensor:
        """What to add to the scores, the same in every layer: the bias, or 0, where a token sees a key, else -inf.

        Keys are the prefix's, then the row's. ``(queries, keys)`` for the decoder, ``(rows, 1, 1, keys)`` for an
        encoder's; with a bias ``(rows or 1, heads, queries, keys)``.
        """
        queries, keys = query.shape[2], keyed.longest
        if site == "decoder":
            seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        else:
            seen = (torch.arange(keys, device=query.device) < keyed.lengths[:, None])[:, None, None]
        length = self.prefix[site][0].shape[1] if site in self.prefix else 0
        seen = F.pad(seen, (length, 0), value=True)
        added = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        if site in self.scores and self.scores[site].bias is not None:
            positions = torch.arange(length + keys, device=query.device)
            added = self.scores[site].bias_at(positions - positions[length : length + queries, None]).to(query.dtype)
            if site in self.unplaced:
                added = added.masked_fill(positions < length, 0)
        return added.masked_fill(~seen, float("-inf"))
