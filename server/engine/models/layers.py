"""The parts that all families share: the Protocol of a layer, norms, activations by name, fused linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

from server.engine.kernels.base import Activation, Attention, Kernels, Linear, Norm

ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
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


def fused_linear(kernels: Kernels, modules: Sequence[Any]) -> Linear:
    """Several ``nn.Linear`` of the same input as one layer, their outputs side by side.

    The modules keep views of the fused tensors, so the weights are in memory once.
    """
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = torch.cat([module.bias.detach() for module in modules])
    begin = 0
    for module in modules:
        end = begin + module.weight.shape[0]
        module.weight.data, module.bias.data = weight[begin:end], bias[begin:end]
        begin = end
    return kernels.linear(weight, bias)
