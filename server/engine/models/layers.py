"""The parts that all families share: the Protocol of a layer, norms, activations by name, fused weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

from server.engine.kernels.base import Activation, Attention, Embedding, Kernels, Linear, Norm

ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
"""transformers' name -> the kernels' name."""


class Layer(Protocol):
    """A layer in two halves, over flattened tokens: ``(tokens, hidden)`` -> the same shape.

    Tokens meet only in ``attend``. A caller that needs only some of the last layer's outputs gives ``feed_forward``
    only those.
    """

    def attend(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """``x`` with what its rows' contexts in ``attention`` add to it."""

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with what the MLP adds to it, each token by itself."""

    def __call__(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Both halves."""
        return self.feed_forward(self.attend(x, attention))


def bound_norm(kernels: Kernels, module: Any) -> Norm:
    """An ``nn.LayerNorm`` by the kernels."""
    return kernels.norm(module.weight.detach(), module.bias.detach(), module.eps)


def bound_rms_norm(kernels: Kernels, module: Any) -> Norm:
    """A root-mean-square norm by the kernels."""
    return kernels.rms_norm(module.weight.detach(), module.variance_epsilon)


def bound_head(kernels: Kernels, head: Any, tokens: Any, bias: torch.Tensor | None = None) -> tuple[Linear, Embedding]:
    """A head, an ``nn.Linear`` whose bias may be a buffer of the model's, and ``tokens``, whose weight may be its."""
    weight, own = tokens.weight.detach(), head.bias
    tied = head.weight.data_ptr() == weight.data_ptr()
    linear = kernels.linear(head.weight.detach(), own.detach() if own is not None else bias)
    return linear, kernels.embedding(weight, linear if tied else None)


def fused(modules: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of several ``nn.Linear`` of the same input as of one, their outputs side by side.

    The modules keep views of the fused tensors, so the weights are in memory once. All have a bias, or none.
    """
    return _joined([module.weight for module in modules]), (
        None if modules[0].bias is None else _joined([module.bias for module in modules])
    )


def _joined(parts: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0].detach()
    whole, begin = torch.cat([part.detach() for part in parts]), 0
    for part in parts:
        end = begin + part.shape[0]
        part.data = whole[begin:end]
        begin = end
    return whole
