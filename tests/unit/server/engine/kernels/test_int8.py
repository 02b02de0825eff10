"""int8 weights against arithmetic straight from the definition: integers exactly, and what rounding may cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from server.engine.kernels import chosen_quantization, select_kernels
from server.engine.kernels.base import Activation
from server.engine.kernels.numba.kernels import NumbaKernels

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@pytest.fixture(scope="module")
def sets() -> Iterator[dict[torch.dtype, NumbaKernels]]:
    made = {dtype: NumbaKernels(dtype, threads=2, quantize="int8") for dtype in DTYPES.values()}
    yield made
    for kernels in made.values():
        kernels.close()


@pytest.fixture(params=list(DTYPES.values()), ids=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    assert isinstance(request.param, torch.dtype)
    return request.param


@pytest.fixture
def kernels(sets: dict[torch.dtype, NumbaKernels], dtype: torch.dtype) -> NumbaKernels:
    return sets[dtype]


def random(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as integers up to ``limit``, and its scale."""
    greatest = x.abs().amax(dim=1)
    steps = torch.full_like(greatest, limit) / greatest  # not ``limit / greatest``: torch multiplies by a reciprocal
    return (x * steps[:, None]).round().to(torch.int64), greatest / limit


def defined(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x wᵀ`` of weights rounded to 8 bits and rows rounded to what a sum in 32 bits has room for."""
    integers, scales = rounded(x, min((2**31 - 1) // (127 * weight.shape[1]), 2**15 - 1))
    greatest = weight.abs().amax(dim=1) / 127
    by = (weight / greatest[:, None]).round().to(torch.int64)
    return (integers @ by.t()).to(x.dtype) * scales[:, None] * greatest


@pytest.mark.parametrize("shape", [(96, 32), (50, 33), (1, 1), (127, 1025), (33, 7), (768, 3072)], ids=str)
def test_a_layer_equals_the_definition_bit_for_bit(
    kernels: NumbaKernels, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, bias = random(0, dtype, *shape), random(1, dtype, shape[0])
    x, residual = random(2, dtype, 80, shape[1]) * 3, random(3, dtype, 80, shape[0] + 5)[:, 2:-3]
    expected = defined(x, weight)
    bare, linear = kernels.linear(weight, None), kernels.linear(weight, bias, "relu")
    for rows in (*range(20), 70, 72, 73, 80):
        assert torch.equal(bare(x[:rows]), expected[:rows]), rows
        whole = residual[:rows] + (expected[:rows] + bias).relu()
        assert torch.equal(linear(x[:rows], residual[:rows]), whole), rows
    assert torch.equal(bare(x.t().contiguous().t()), expected), "rows of another layout"


def test_more_rows_than_go_through_a_layer_together_equal_the_definition(
    kernels: NumbaKernels, dtype: torch.dtype
) -> None:
    weight, x = random(4, dtype, 40, 24), random(5, dtype, 2100, 24)
    assert torch.equal(kernels.linear(weight, None)(x), defined(x, weight))


@pytest.mark.parametrize("count", [1, 768, 3072, 16384])
def test_the_greatest_sum_fits(kernels: NumbaKernels, dtype: torch.dtype, count: int) -> None:
    """Every product at its greatest and of one sign."""
    linear = kernels.linear(torch.full((17, count), -0.5, dtype=dtype), None)
    made = linear(torch.full((3, count), 2.0, dtype=dtype))
    assert torch.allclose(made, torch.full_like(made, -count), rtol=1e-6)


def test_what_rounding_costs_is_that_of_the_weights(kernels: NumbaKernels, dtype: torch.dtype) -> None:
    """Beside it, what rows lose in 12 bits is little, even next to an input a hundred times the others."""
    weight, x = random(6, dtype, 300, 3072), random(7, dtype, 40, 3072)
    x[:, 5] *= 100
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    exact, with_rounded = x @ weight.t(), x @ ((weight / scales).round() * scales).t()
    whole, own = ((kernels.linear(weight, None)(x) - other).square().mean().sqrt() for other in (exact, with_rounded))
    assert own < 0.5 * whole
    assert whole < 0.02 * exact.square().mean().sqrt()


def test_a_row_spoils_no_other_and_zeros_stay_zeros(kernels: NumbaKernels, dtype: torch.dtype) -> None:
    weight, x = random(8, dtype, 20, 33), random(9, dtype, 8, 33)
    linear = kernels.linear(weight, None)
    expected = linear(x)
    x[1], x[2, 32], x[3, 0], x[4, 7], x[5] = 0, torch.nan, torch.inf, -torch.inf, 1e-35
    made = linear(x)
    assert torch.equal(made[[0, 6, 7]], expected[[0, 6, 7]])
    assert not made[[1, 5]].any()
    assert made[2:5].isnan().all(), "a row that is not finite has no finite output"
    assert not kernels.linear(torch.zeros(20, 33, dtype=dtype), None)(x[:2]).any(), "a weight of zeros"
    assert not kernels.linear(torch.zeros(20, 0, dtype=dtype), None)(x[:2, :0]).any(), "no inputs"


def test_a_rows_bits_depend_on_nothing_but_the_row(dtype: torch.dtype) -> None:
    weight, x = random(10, dtype, 768, 1100), random(11, dtype, 130, 1100)
    made = []
    for threads in (1, 2, 3):
        kernels = select_kernels("cpu", dtype, threads=threads, deterministic=True, quantize="int8")
        linear = kernels.linear(weight, weight[:, 0], "gelu_new")
        made.append(linear(x))
        for rows in (1, 2, 3, 4, 5, 8, 33, 64, 65, 129):
            assert torch.equal(linear(x[:rows]), made[-1][:rows]), rows
        kernels.close()  # type: ignore[attr-defined]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("activation", ["silu", "gelu_new"])
def test_a_gated_layer_is_a_layer_and_its_gate(
    kernels: NumbaKernels, dtype: torch.dtype, activation: Activation
) -> None:
    weight, x = random(12, dtype, 2 * 50, 33), random(13, dtype, 70, 33)
    gate, other = kernels.linear(weight, None)(x).double().chunk(2, dim=1)
    expected = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * other
    for rows in (0, 1, 16, 17, 70):
        made = kernels.gated(weight, None, activation)(x[:rows])
        assert torch.allclose(made.double(), expected[:rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_rounded_as_its_head_is(kernels: NumbaKernels, dtype: torch.dtype, tied: bool) -> None:
    weight, ids = random(14, dtype, 75, 9), torch.tensor([0, 74, 15, 16, 15, 63])
    embedding = kernels.embedding(weight, kernels.linear(weight, None) if tied else None)
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    assert torch.equal(embedding(ids), ((weight / scales).round() * scales)[ids])
    assert embedding(ids[:0]).shape == (0, 9)


def test_weights_may_be_given_up() -> None:
    kernels = NumbaKernels(threads=1, take_weights=True, quantize="int8")
    linear, embedding = random(15, torch.float32, 20, 8), random(16, torch.float32, 20, 8)
    kernels.linear(linear, None)
    kernels.embedding(embedding, None)
    assert (linear.untyped_storage().nbytes(), embedding.untyped_storage().nbytes()) == (0, 0)
    kernels.close()


def test_a_layer_of_more_inputs_than_a_sum_has_room_for_is_refused(kernels: NumbaKernels, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="expected at most 133144 inputs to a layer, got 133145; use none"):
        kernels.linear(torch.zeros(1, 133145, dtype=dtype), None)
    kernels.linear(torch.zeros(1, 133144, dtype=dtype), None)


@pytest.mark.parametrize("device, dtype, name", [
    ("cpu", torch.float32, "torch"), ("cpu", torch.bfloat16, "auto"), ("cuda", torch.float32, "auto"),
])  # fmt: skip
def test_torchs_kernels_have_no_int8(device: str, dtype: torch.dtype, name: str) -> None:
    with pytest.raises(ValueError, match=rf"quantize int8: expected numba kernels .*, got torch for {dtype} on"):
        select_kernels(device, dtype, name, quantize="int8")


@pytest.mark.parametrize("asked, stored, device, dtype, name, chosen", [
    ("auto", True, "cpu", torch.float32, "auto", "int8"),
    ("auto", True, "cpu", torch.float32, "numba", "int8"),
    ("auto", False, "cpu", torch.float32, "auto", "none"),
    ("auto", True, "cpu", torch.float32, "torch", "none"),
    ("auto", True, "cpu", torch.float64, "auto", "none"),
    ("auto", True, "cuda", torch.float32, "auto", "none"),
    ("none", True, "cpu", torch.float32, "auto", "none"),
    ("int8", False, "cuda", torch.bfloat16, "torch", "int8"),
])  # fmt: skip
def test_auto_is_int8_where_the_file_has_no_more_and_the_machine_can(
    asked: Any, stored: bool, device: str, dtype: torch.dtype, name: str, chosen: str
) -> None:
    assert chosen_quantization(asked, device, dtype, name, stored=stored) == chosen
