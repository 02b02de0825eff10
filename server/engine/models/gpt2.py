"""GPT-2 over transformers' weights: embeddings, blocks, head. Attention and linear layers come from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from prefixes.backbone import Backbone
from prefixes.spec import Site
from server.engine.kernels.base import Activation, Attention, Kernels, Linear, Scores
from server.engine.models.layers import ACTIVATIONS, Layer, bound_head, bound_norm


class _Block(Layer):
    """Pre-norm attention and MLP of one layer."""

    def __init__(self, layer: int, module: Any, heads: int, activation: Activation, kernels: Kernels) -> None:
        def linear(conv: Any, activation: Activation = "none") -> Linear:
            # transformers' Conv1D stores (in, out); kernels want (out, in), contiguous. It keeps a view of ours, so the
            # weights are in memory once.
            weight = conv.weight.detach().t().contiguous()
            conv.weight.data = weight.t()
            return kernels.linear(weight, conv.bias.detach(), activation)

        self._layer, self._heads = layer, heads
        self._attention_norm, self._mlp_norm = bound_norm(kernels, module.ln_1), bound_norm(kernels, module.ln_2)
        self._qkv = linear(module.attn.c_attn)
        self._project = linear(module.attn.c_proj)
        self._up = linear(module.mlp.c_fc, activation)
        self._down = linear(module.mlp.c_proj)

    def attend(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        qkv = self._qkv(self._attention_norm(x)).view(x.shape[0], 3, self._heads, -1)  # (tokens, 3, heads, head_dim)
        query, key, value = qkv.unbind(1)
        attended = attention("decoder", self._layer, query, key, value)
        return self._project(attended.reshape(x.shape), x)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._up(self._mlp_norm(x)), x)


class GPT2:
    """See ``models.Model``. Shares the backbone's tensors; its Conv1D weights become views of transposed ones."""

    encoder: None = None

    def __init__(self, backbone: Backbone, kernels: Kernels) -> None:
        config, transformer = backbone.model.config, backbone.model.transformer
        activation = ACTIVATIONS[config.activation_function]
        self._position_embedding = transformer.wpe.weight.detach()
        self.layers = [
            _Block(layer, module, config.n_head, activation, kernels) for layer, module in enumerate(transformer.h)
        ]
        self._final_norm = bound_norm(kernels, transformer.ln_f)
        self._head, self._embedding = bound_head(kernels, backbone.model.lm_head, transformer.wte)
        self.scores: Mapping[Site, Scores] = {}

    def attention(self, positions: torch.Tensor, attention: Attention) -> Attention:
        return attention

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._embedding(token_ids) + F.embedding(positions, self._position_embedding)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._final_norm(hidden))
