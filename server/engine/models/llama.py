"""The Llama family over transformers' weights: rotary positions, shared key heads, RMS norms, a gated MLP.

Covers Llama 2 and 3, Mistral, Qwen2 and 3, SmolLM2 and 3: they differ in biases, norms of queries and keys, and in
layers without positions, which the weights and the configuration say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prefixes.backbone import Backbone
from prefixes.spec import Site
from server.engine.kernels.base import Attention, Kernels, Norm, Scores
from server.engine.models.layers import ACTIVATIONS, Layer, bound_head, bound_rms_norm, fused


@dataclass(frozen=True)
class _Rotating:
    """``Attention`` that rotates queries and keys by their tokens' positions, but for ``bare`` layers.

    Contexts hold keys as they are rotated. So do prefixes, whose keys attention takes as they are.
    """

    attention: Attention
    kernels: Kernels
    cos: torch.Tensor  # (tokens, head_dim / 2)
    sin: torch.Tensor
    bare: frozenset[int]

    def __call__(
        self, site: Site, layer: int, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> torch.Tensor:
        if layer not in self.bare:
            query = self.kernels.rotate(query, self.cos, self.sin)
            key = None if key is None else self.kernels.rotate(key, self.cos, self.sin)
        return self.attention(site, layer, query, key, value)

    def store(self, site: Site, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        raise AssertionError("a decoder without an encoder stores nothing for it")


class _Block(Layer):
    """Pre-norm attention and gated MLP of one layer."""

    def __init__(self, layer: int, module: Any, head_dim: int, activation: str, kernels: Kernels) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._layer, self._head_dim = layer, head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._heads = [part.weight.shape[0] // head_dim for part in projections]
        self._attention_norm = bound_rms_norm(kernels, module.input_layernorm)
        self._mlp_norm = bound_rms_norm(kernels, module.post_attention_layernorm)
        self._qkv = kernels.linear(*fused(projections))
        self._query_norm, self._key_norm = (
            bound_rms_norm(kernels, getattr(attention, name)) if hasattr(attention, name) else None
            for name in ("q_norm", "k_norm")
        )
        self._project = kernels.linear(*fused((attention.o_proj,)))
        self._gated = kernels.gated(*fused((mlp.gate_proj, mlp.up_proj)), ACTIVATIONS[activation])
        self._down = kernels.linear(*fused((mlp.down_proj,)))

    def attend(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        qkv = self._qkv(self._attention_norm(x)).view(x.shape[0], -1, self._head_dim)  # (tokens, all heads, head_dim)
        query, key, value = qkv.split(self._heads, dim=1)
        query, key = _normed(query, self._query_norm), _normed(key, self._key_norm)
        attended = attention("decoder", self._layer, query, key, value)
        return self._project(attended.reshape(x.shape[0], -1), x)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._gated(self._mlp_norm(x)), x)


class Llama:
    """See ``models.Model``. Shares the backbone's tensors: projections of the same input become views of fused ones."""

    encoder: None = None

    def __init__(self, backbone: Backbone, kernels: Kernels) -> None:
        model, config = backbone.model.model, backbone.model.config
        head_dim = backbone.spec.sites["decoder"].head_dim
        self._kernels, self._dtype = kernels, backbone.model.dtype
        # transformers computes them for every kind of scaling; YaRN's factor is its ``attention_scaling``.
        self._frequencies, self._scaling = model.rotary_emb.inv_freq, float(model.rotary_emb.attention_scaling)
        rotated = getattr(config, "no_rope_layers", None)  # despite its name, 1 for layers with positions
        self._bare = frozenset(layer for layer, rotates in enumerate(rotated or ()) if not rotates)
        self.layers = [
            _Block(layer, module, head_dim, config.hidden_act, kernels) for layer, module in enumerate(model.layers)
        ]
        self._final_norm = bound_rms_norm(kernels, model.norm)
        self._head, self._embedding = bound_head(kernels, backbone.model.lm_head, model.embed_tokens)
        self.scores: Mapping[Site, Scores] = {}

    def attention(self, positions: torch.Tensor, attention: Attention) -> Attention:
        angles = positions[:, None].float() * self._frequencies.float()  # (tokens, head_dim / 2), as transformers does
        cos, sin = ((part * self._scaling).to(self._dtype) for part in (angles.cos(), angles.sin()))
        return _Rotating(attention, self._kernels, cos, sin, self._bare)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._embedding(token_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._final_norm(hidden))


def _normed(heads: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """Each head of ``(tokens, heads, head_dim)`` by itself."""
    return heads if norm is None else norm(heads.reshape(-1, heads.shape[-1])).view(heads.shape)
