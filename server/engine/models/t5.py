"""T5 over transformers' weights: relative positions as a bias of the scores, RMS norms, a plain or gated MLP.

Covers T5 (v1.0), T5 v1.1, Flan-T5 and mT5: they differ in the MLP and the head, which the weights and the configuration
say. Each stack has one table of the bias, which its first layer holds. Queries are not scaled. Cross-attention has no
bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from prefixes.backbone import Backbone
from prefixes.spec import Site
from server.engine.kernels.base import Attention, Embedding, Kernels, Scores
from server.engine.models.layers import ACTIVATIONS, Layer, bound_head, bound_rms_norm, fused


def _bound_norm(kernels: Kernels, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    norm, dtype = bound_rms_norm(kernels, module), module.weight.dtype
    return lambda x: norm(x).to(dtype)  # x is float32 in a float16 model, see _FeedForward


def _scores(stack: Any) -> Scores:
    """Scores of a stack's self-attention."""
    attention = stack.block[0].layer[0].SelfAttention
    reach = int(attention.relative_attention_max_distance)  # no distance beyond it has a bucket of its own
    bias = attention.compute_bias(1, 2 * reach + 1, past_seen_tokens=reach)[0, :, 0]  # (heads, 2 * reach + 1)
    return Scores(1.0, bias.detach().contiguous())


class _SelfAttention:
    """Attention of a layer's tokens to their own row, with the norm before and the residual behind it."""

    def __init__(self, site: Site, layer: int, module: Any, kernels: Kernels) -> None:
        attention = module.SelfAttention
        self._site, self._layer, self._heads = site, layer, attention.n_heads
        self._norm = _bound_norm(kernels, module.layer_norm)
        self._qkv = kernels.linear(*fused((attention.q, attention.k, attention.v)))
        self._project = kernels.linear(*fused((attention.o,)))

    def __call__(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        qkv = self._qkv(self._norm(x)).view(x.shape[0], 3, self._heads, -1)  # (tokens, 3, heads, head_dim)
        query, key, value = qkv.unbind(1)
        attended = attention(self._site, self._layer, query, key, value)
        return self._project(attended.reshape(x.shape[0], -1), x)


class _CrossAttention:
    """Attention of decoder tokens to their row's encoded input; ``store`` makes the keys and values once per input."""

    def __init__(self, layer: int, module: Any, kernels: Kernels) -> None:
        attention = module.EncDecAttention
        self._layer, self._heads = layer, attention.n_heads
        self._norm = _bound_norm(kernels, module.layer_norm)
        self._query = kernels.linear(*fused((attention.q,)))
        self._kv = kernels.linear(*fused((attention.k, attention.v)))
        self._project = kernels.linear(*fused((attention.o,)))

    def store(self, encoded: torch.Tensor, attention: Attention) -> None:
        kv = self._kv(encoded).view(encoded.shape[0], 2, self._heads, -1)  # (tokens, 2, heads, head_dim)
        key, value = kv.unbind(1)
        attention.store("cross", self._layer, key, value)

    def __call__(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        query = self._query(self._norm(x)).view(x.shape[0], self._heads, -1)
        attended = attention("cross", self._layer, query, None, None)
        return self._project(attended.reshape(x.shape[0], -1), x)


class _FeedForward:
    """The MLP of a layer, with the norm before and the residual behind it."""

    def __init__(self, module: Any, config: Any, kernels: Kernels) -> None:
        mlp, activation = module.DenseReluDense, ACTIVATIONS[config.dense_act_fn]
        self._norm = _bound_norm(kernels, module.layer_norm)
        self._up = (
            kernels.gated(*fused((mlp.wi_0, mlp.wi_1)), activation)
            if config.is_gated_act
            else kernels.linear(*fused((mlp.wi,)), activation)
        )
        self._down = kernels.linear(*fused((mlp.wo,)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        inner = self._up(self._norm(x))
        if inner.dtype == torch.float16:  # transformers keeps the second layer, and so the residual sums, in float32
            inner = inner.float()
        return self._down(inner, x)


class _EncoderLayer(Layer):
    """Self-attention and MLP."""

    def __init__(self, layer: int, module: Any, config: Any, kernels: Kernels) -> None:
        self._attend = _SelfAttention("encoder", layer, module.layer[0], kernels)
        self._feed_forward = _FeedForward(module.layer[-1], config, kernels)

    def attend(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        return self._attend(x, attention)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._feed_forward(x)


class _DecoderLayer(Layer):
    """Self-attention, cross-attention and MLP."""

    def __init__(self, layer: int, module: Any, config: Any, cross: _CrossAttention, kernels: Kernels) -> None:
        self._attend = _SelfAttention("decoder", layer, module.layer[0], kernels)
        self._cross, self._feed_forward = cross, _FeedForward(module.layer[-1], config, kernels)

    def attend(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        return self._cross(self._attend(x, attention), attention)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._feed_forward(x)


class T5Encoder:
    """See ``models.Encoder``. Units: the encoder's layers, then each decoder layer's cross-attention."""

    def __init__(self, model: Any, cross: list[_CrossAttention], tokens: Embedding, kernels: Kernels) -> None:
        self._tokens, self._cross = tokens, cross
        self.layers = [
            _EncoderLayer(layer, part, model.config, kernels) for layer, part in enumerate(model.encoder.block)
        ]
        self._final_norm = _bound_norm(kernels, model.encoder.final_layer_norm)
        self.units = len(self.layers) + len(cross)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._tokens(token_ids)

    def advance(self, hidden: torch.Tensor, units: range, attention: Attention) -> torch.Tensor:
        for unit in units:
            if unit < len(self.layers):
                hidden = self.layers[unit](hidden, attention)
                continue
            if unit == len(self.layers):
                hidden = self._final_norm(hidden)
            self._cross[unit - len(self.layers)].store(hidden, attention)
        return hidden


class T5:
    """See ``models.Model``. Shares the backbone's tensors: projections of the same input become views of fused ones."""

    def __init__(self, backbone: Backbone, kernels: Kernels) -> None:
        model, config = backbone.model, backbone.model.config
        cross = [_CrossAttention(layer, part.layer[1], kernels) for layer, part in enumerate(model.decoder.block)]
        self._head, self._tokens = bound_head(kernels, model.lm_head, model.shared)
        self.encoder = T5Encoder(model, cross, self._tokens, kernels)
        self.scores: Mapping[Site, Scores] = {
            "encoder": _scores(model.encoder), "decoder": _scores(model.decoder), "cross": Scores(1.0)
        }  # fmt: skip
        self.layers = [
            _DecoderLayer(layer, part, config, cross[layer], kernels) for layer, part in enumerate(model.decoder.block)
        ]
        self._final_norm = _bound_norm(kernels, model.decoder.final_layer_norm)
        # Of T5 v1.0, whose head is the embedding; mT5's configuration has no such key.
        self._scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0

    def attention(self, positions: torch.Tensor, attention: Attention) -> Attention:
        return attention

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._tokens(token_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._final_norm(hidden) * self._scale)
