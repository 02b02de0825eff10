"""BART over transformers' weights: a bidirectional encoder in resumable units, and a decoder that attends to it.

Norms follow the residual sums (post-norm). Position 0 is row 2 of the position table, as in the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from prefixes.backbone import Backbone
from prefixes.spec import Site
from server.engine.kernels.base import Activation, Attention, Embedding, Kernels, Linear, Scores
from server.engine.models.layers import ACTIVATIONS, Layer, bound_head, bound_norm, fused

POSITION_OFFSET = 2
HALF_LIMIT = torch.finfo(torch.float16).max - 1000


def _linear(kernels: Kernels, module: Any, activation: Activation = "none") -> Linear:
    return kernels.linear(module.weight.detach(), module.bias.detach(), activation)


class _Embedding:
    """Tokens, positions and the norm of their sum."""

    def __init__(self, module: Any, tokens: Embedding, scale: float, kernels: Kernels) -> None:
        self._tokens = tokens
        self._positions = module.embed_positions.weight.detach()
        self._norm, self._scale = bound_norm(kernels, module.layernorm_embedding), scale

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tokens = self._tokens(token_ids)
        if self._scale != 1.0:
            tokens = tokens * self._scale
        return self._norm(tokens, F.embedding(positions + POSITION_OFFSET, self._positions))


class _SelfAttention:
    """Attention of a layer's tokens to their own row, with the residual and its norm."""

    def __init__(self, site: Any, layer: int, module: Any, heads: int, kernels: Kernels) -> None:
        attention = module.self_attn
        self._site, self._layer, self._heads = site, layer, heads
        self._qkv = kernels.linear(*fused((attention.q_proj, attention.k_proj, attention.v_proj)))
        self._project = _linear(kernels, attention.out_proj)
        self._norm = bound_norm(kernels, module.self_attn_layer_norm)

    def __call__(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        qkv = self._qkv(x).view(x.shape[0], 3, self._heads, -1)  # (tokens, 3, heads, head_dim)
        query, key, value = qkv.unbind(1)
        attended = attention(self._site, self._layer, query, key, value)
        return self._norm(self._project(attended.reshape(x.shape)), x)


class _CrossAttention:
    """Attention of decoder tokens to their row's encoded input; ``store`` makes the keys and values once per input."""

    def __init__(self, layer: int, module: Any, heads: int, kernels: Kernels) -> None:
        attention = module.encoder_attn
        self._layer, self._heads = layer, heads
        self._query = _linear(kernels, attention.q_proj)
        self._kv = kernels.linear(*fused((attention.k_proj, attention.v_proj)))
        self._project = _linear(kernels, attention.out_proj)
        self._norm = bound_norm(kernels, module.encoder_attn_layer_norm)

    def store(self, encoded: torch.Tensor, attention: Attention) -> None:
        kv = self._kv(encoded).view(encoded.shape[0], 2, self._heads, -1)  # (tokens, 2, heads, head_dim)
        key, value = kv.unbind(1)
        attention.store("cross", self._layer, key, value)

    def __call__(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        query = self._query(x).view(x.shape[0], self._heads, -1)
        attended = attention("cross", self._layer, query, None, None)
        return self._norm(self._project(attended.reshape(x.shape)), x)


class _FeedForward:
    """The MLP of a layer, with the residual and its norm."""

    def __init__(self, module: Any, activation: Activation, kernels: Kernels) -> None:
        self._up, self._down = _linear(kernels, module.fc1, activation), _linear(kernels, module.fc2)
        self._norm = bound_norm(kernels, module.final_layer_norm)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(self._down(self._up(x)), x)


class _EncoderLayer(Layer):
    """Self-attention and MLP."""

    def __init__(self, layer: int, module: Any, heads: int, activation: Activation, kernels: Kernels) -> None:
        self._attend = _SelfAttention("encoder", layer, module, heads, kernels)
        self._feed_forward = _FeedForward(module, activation, kernels)

    def attend(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        return self._attend(x, attention)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._feed_forward(x)
        if x.dtype == torch.float16:  # transformers clamps too, where something has overflowed
            x = x.clamp(-HALF_LIMIT, HALF_LIMIT)
        return x


class _DecoderLayer(Layer):
    """Self-attention, cross-attention and MLP."""

    def __init__(
        self, layer: int, module: Any, heads: int, activation: Activation, cross: _CrossAttention, kernels: Kernels
    ) -> None:
        self._attend = _SelfAttention("decoder", layer, module, heads, kernels)
        self._cross, self._feed_forward = cross, _FeedForward(module, activation, kernels)

    def attend(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        return self._cross(self._attend(x, attention), attention)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._feed_forward(x)


class BartEncoder:
    """See ``models.Encoder``. Units: the encoder's layers, then each decoder layer's cross-attention."""

    def __init__(
        self, module: Any, cross: list[_CrossAttention], tokens: Embedding, scale: float, kernels: Kernels
    ) -> None:
        heads, activation = module.config.encoder_attention_heads, ACTIVATIONS[module.config.activation_function]
        self._embedding, self._cross = _Embedding(module, tokens, scale, kernels), cross
        self.layers = [
            _EncoderLayer(layer, part, heads, activation, kernels) for layer, part in enumerate(module.layers)
        ]
        self.units = len(self.layers) + len(cross)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._embedding(token_ids, positions)

    def advance(self, hidden: torch.Tensor, units: range, attention: Attention) -> torch.Tensor:
        for unit in units:
            if unit < len(self.layers):
                hidden = self.layers[unit](hidden, attention)
            else:
                self._cross[unit - len(self.layers)].store(hidden, attention)
        return hidden


class Bart:
    """See ``models.Model``. Shares the backbone's tensors: projections of the same input become views of fused ones."""

    def __init__(self, backbone: Backbone, kernels: Kernels) -> None:
        config, decoder = backbone.model.config, backbone.model.model.decoder
        heads, activation = config.decoder_attention_heads, ACTIVATIONS[config.activation_function]
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        cross = [_CrossAttention(layer, part, heads, kernels) for layer, part in enumerate(decoder.layers)]
        # The head's bias is a buffer of shape (1, vocab), all zero in the published checkpoints.
        bias = backbone.model.final_logits_bias.detach()[0]
        self._head, tokens = bound_head(
            kernels, backbone.model.lm_head, backbone.model.model.shared, bias.contiguous() if bias.any() else None
        )
        self.encoder = BartEncoder(backbone.model.model.encoder, cross, tokens, scale, kernels)
        self._embedding = _Embedding(decoder, tokens, scale, kernels)
        self.layers = [
            _DecoderLayer(layer, part, heads, activation, cross[layer], kernels)
            for layer, part in enumerate(decoder.layers)
        ]
        self.scores: Mapping[Site, Scores] = {}

    def attention(self, positions: torch.Tensor, attention: Attention) -> Attention:
        return attention

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._embedding(token_ids, positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)
