"""The operations over frozen weights equal the reference kernels and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from server.engine.kernels.dense import DenseKernels
from server.engine.kernels.frozen import product
from server.engine.kernels.torch_reference import TorchKernels

Operation = Callable[[TorchKernels, torch.dtype], Callable[[torch.Tensor], torch.Tensor]]

TOKENS, WIDTH = 11, 24


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotating(kernels: TorchKernels, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    angles = drawn(TOKENS, 4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return lambda x: kernels.rotate(x.view(TOKENS, 3, 8), cos, sin).flatten(1)


OPERATIONS: dict[str, Operation] = {
    "linear": lambda kernels, dtype: kernels.linear(drawn(17, WIDTH).to(dtype), drawn(17).to(dtype)),
    "without bias": lambda kernels, dtype: kernels.linear(drawn(17, WIDTH).to(dtype), None),
    "activated": lambda kernels, dtype: kernels.linear(drawn(17, WIDTH).to(dtype), drawn(17).to(dtype), "gelu_new"),
    "strided weight": lambda kernels, dtype: kernels.linear(drawn(WIDTH, 17).to(dtype).t(), None),
    "gated": lambda kernels, dtype: kernels.gated(drawn(18, WIDTH).to(dtype), drawn(18).to(dtype), "silu"),
    "rms norm": lambda kernels, dtype: kernels.rms_norm(drawn(WIDTH).to(dtype), 1e-2),
    "rotation": rotating,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    results = []
    for kernels in (DenseKernels(), TorchKernels()):
        # A slice of a wider tensor: not contiguous, as the projections of one fused product are.
        whole = drawn(TOKENS, WIDTH + 5, seed=1).to(dtype).requires_grad_()
        x = whole[:, 3 : 3 + WIDTH]
        x = x if name != "rotation" else x.contiguous()
        made = OPERATIONS[name](kernels, dtype)(x)
        made.backward(drawn(*made.shape, seed=2).to(dtype))
        results.append((made.detach(), whole.grad))
    exact = dtype == torch.float64
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-5)


def test_a_rotation_takes_a_part_of_fused_heads_and_gives_its_gradient_back() -> None:
    fused = drawn(TOKENS, 5, 8).requires_grad_()
    angles = drawn(TOKENS, 4, seed=3)
    made = DenseKernels().rotate(fused[:, 1:3], angles.cos(), angles.sin())
    back = DenseKernels().rotate(made, angles.cos(), -angles.sin())
    torch.testing.assert_close(back, fused[:, 1:3], rtol=1e-12, atol=1e-12)
    made.square().sum().backward()
    assert fused.grad is not None
    torch.testing.assert_close(fused.grad[:, 1:3], 2 * fused.detach()[:, 1:3], rtol=1e-12, atol=1e-12)
    assert not fused.grad[:, [0, 3, 4]].any()


def test_the_product_takes_any_strides_and_a_single_row() -> None:
    weight = drawn(40, 30).float()
    for rows in (1, 2, 33):
        for x in (drawn(rows, 30).float(), drawn(30, rows).float().t(), drawn(rows, 70).float()[:, 10:70:2]):
            torch.testing.assert_close(product(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)
            back = drawn(rows, 40).float()
            torch.testing.assert_close(product(back, weight.t()), back @ weight, rtol=1e-5, atol=1e-5)


def test_half_precision_rows_are_measured_in_float32() -> None:
    x = (drawn(TOKENS, WIDTH) * 300).to(torch.float16)  # squares beyond float16
    weight = torch.ones(WIDTH, dtype=torch.float16)
    made = DenseKernels().rms_norm(weight, 1e-5)(x)
    torch.testing.assert_close(made, TorchKernels().rms_norm(weight, 1e-5)(x))
    assert made.isfinite().all()
