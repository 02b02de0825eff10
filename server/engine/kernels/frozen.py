"""Differentiable operations of training: weights are frozen, and gradients flow to activations alone, by closed forms.

Autograd's own would keep and make more: a tensor per elementary operation, and zeros around every slice. Each function
says what it equals, up to rounding. They have no gradient of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of ``x (rows, in)`` and ``weight (out, in)``, both of any strides.

    In float32 on a CPU it is oneDNN's, where ``F.linear`` takes another library's: 1.1 to 1.6 times as fast for some
    hundred rows (AMD EPYC).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and _has_onednn():
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return made
    return F.linear(x, weight, bias)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FrozenLinear(torch.autograd.Function):
    """``apply(x, weight, bias)``: ``F.linear``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return product(gradients[0], ctx.weight.t()), None, None


class FrozenRmsNorm(torch.autograd.Function):
    """``apply(x, weight, eps)``: ``x / rms(x) * weight``, ``rms(x)² = mean(x²) + eps``, rows by themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse)
        ctx.weight = weight
        return torch.mul(x, inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """``∂x = (v - x · mean(v · x) / rms²) / rms``, ``v = ∂y · weight``."""
        x, inverse = ctx.saved_tensors
        made = gradients[0] * ctx.weight
        along = torch.linalg.vecdot(made, x).unsqueeze(-1).mul_(inverse.square()).div_(-x.shape[-1])
        return made.addcmul_(x, along).mul_(inverse), None, None


class GatedSilu(torch.autograd.Function):
    """``apply(x)``: ``silu(gate) * other`` of ``x``'s two halves, ``(rows, 2 · n)`` -> ``(rows, n)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, other = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), gradient = ctx.saved_tensors, gradients[0]
        gate, other = x.chunk(2, dim=-1)
        made = torch.empty_like(x)
        to_gate, to_other = made.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(gradient * other, gate, grad_input=to_gate)
        torch.mul(F.silu(gate), gradient, out=to_other)
        return made


class Rotation(torch.autograd.Function):
    """``apply(x, cos, sin)``: ``Kernels.rotate``. Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos, ctx.sin = cos[:, None], sin[:, None]
        return _rotated(x, ctx.cos, ctx.sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(gradients[0], ctx.cos, ctx.sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sense: int) -> Tensor:
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (low, high), (made_low, made_high) = x.chunk(2, dim=-1), made.chunk(2, dim=-1)
    torch.mul(low, cos, out=made_low).addcmul_(high, sin, value=-sense)
    torch.mul(high, cos, out=made_high).addcmul_(low, sin, value=sense)
    return made


class Scatter(torch.autograd.Function):
    """``apply(x, places, size)``: zeros ``(size, ...)`` with ``x``'s rows at ``places``, each there once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.places = places
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.places), None, None


class Gather(torch.autograd.Function):
    """``apply(x, places)``: ``x``'s rows at ``places``, none of them twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.size = places, x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        made = gradients[0].new_zeros(ctx.size, *gradients[0].shape[1:])
        return made.index_copy_(0, ctx.places, gradients[0]), None
