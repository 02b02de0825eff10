"""What the families' modules are made of: norms, activations by name, fused linear layers, how a layer is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from server.engine.kernels.base import Activation, Kernels, Linear, Norm

ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
}
"""A configuration's name -> the kernels'."""

LayerCall = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]
"""Runs a layer over its input and gives its output; the trainer's may keep only the input and run it once more for the
gradient."""


def at_once(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The usual ``LayerCall``."""
    return layer(x)


def bound_norm(kernels: Kernels, module: Any) -> Norm:
    """An ``nn.LayerNorm`` by the kernels."""
    return kernels.norm(module.weight.detach(), module.bias.detach(), module.eps)


def fused_linear(kernels: Kernels, modules: Sequence[Any]) -> Linear:
    """Several ``nn.Linear`` of the same input as one layer, their outputs side by side.

    The modules keep views of the fused tensors: the weights stand in memory once.
    """
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = torch.cat([module.bias.detach() for module in modules])
    begin = 0
    for module in modules:
        end = begin + module.weight.shape[0]
        module.weight.data, module.bias.data = weight[begin:end], bias[begin:end]
        begin = end
    return kernels.linear(weight, bias)
