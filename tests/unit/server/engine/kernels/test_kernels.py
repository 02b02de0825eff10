"""Both kernel sets against arithmetic straight from the definition, in float64."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

from server.engine.kernels import select_kernels
from server.engine.kernels.base import Activation, Kernels, KVCache, PagedBatch, Scores
from server.engine.kernels.numba.kernels import NumbaKernels
from server.engine.kernels.torch_reference import TorchKernels
from tests.support.kernels import Case, Row, make_case, naive_attention

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
PREFIXES, COUNTS, BLOCK_SIZES = (0, 1, 5, 16, 17, 100), (0, 1, 7, 40), (8, 16, 32)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}  # of the greatest value
KernelsFor = dict[tuple[str, torch.dtype], Kernels]


@pytest.fixture(scope="module")
def kernel_sets() -> Iterator[KernelsFor]:
    numba = {dtype: NumbaKernels(dtype, threads=2) for dtype in TOLERANCE}
    yield {("torch", dtype): TorchKernels() for dtype in TOLERANCE} | {("numba", d): k for d, k in numba.items()}
    for kernels in numba.values():
        kernels.close()


@pytest.fixture(params=["torch", "numba"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(TOLERANCE), ids=["fp32", "fp64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    assert isinstance(request.param, torch.dtype)
    return request.param


@pytest.fixture
def kernels(kernel_sets: KernelsFor, name: str, dtype: torch.dtype) -> Kernels:
    return kernel_sets[name, dtype]


@pytest.fixture
def numba(kernel_sets: KernelsFor) -> NumbaKernels:
    kernels = kernel_sets["numba", torch.float32]
    assert isinstance(kernels, NumbaKernels)
    return kernels


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    bound = TOLERANCE[got.dtype] * max(expected.abs().max().item(), 1) if expected.numel() else 0
    assert torch.allclose(got.double(), expected, rtol=0, atol=bound), (got.double() - expected).abs().max()


def random_rows(rng: random.Random, causal: bool) -> list[Row]:
    rows = []
    for _ in range(rng.randint(1, 6)):
        count = rng.choice(COUNTS)
        prefix = rng.choice(PREFIXES)
        own = count + rng.choice((0, 1, 30)) if causal else rng.choice((0, 1, 33))
        rows.append(Row(prefix, own if prefix else max(own, 1), count))  # without any key there is nothing to define
    return rows


def attend(kernels: Kernels, case: Case) -> torch.Tensor:
    return kernels.prepare(case.cache, case.batch).attend(1, case.qkv[:, 0])


@pytest.mark.parametrize("vocab", [5, 64, 65, 1000])
def test_the_most_likely_tokens_are_those_of_log_softmax(kernels: Kernels, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(70, vocab, generator=generator) * 4
    logits[3, : vocab - 1] = -torch.inf  # all but one banned
    logits[4] = logits[4].sort().values
    logits[5] = logits[5].sort(descending=True).values
    for rows, count in ((1, 1), (9, 4), (70, 5)):
        values, ids = kernels.top_log_probs(logits[:rows], count)
        expected = torch.log_softmax(logits[:rows].double(), dim=1)
        assert torch.allclose(values.double(), torch.topk(expected, count).values, rtol=0, atol=1e-5)
        assert torch.allclose(expected.gather(1, ids), values.double(), rtol=0, atol=1e-5), "each id has its value"
        assert all(len(set(row)) == count for row in ids.tolist())


def test_a_row_with_nan_or_infinity_has_no_finite_log_probability(kernels: Kernels) -> None:
    places, worst = (0, 7, 8, 70, 299), (torch.nan, torch.inf)  # among the first, in a block, in a part of one
    for place, value in itertools.product(places, worst):
        logits = torch.randn(2, 300)
        logits[0, place] = value
        values, _ = kernels.top_log_probs(logits, 8)
        assert torch.isfinite(values[:, 0]).tolist() == [False, True]


@pytest.mark.parametrize("width", [1, 7, 33, 768])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_equals_the_definition(
    kernels: Kernels, dtype: torch.dtype, width: int, with_residual: bool
) -> None:
    generator = torch.Generator().manual_seed(width)
    weight, bias = (torch.randn(width, dtype=dtype, generator=generator) for _ in range(2))
    x = torch.randn(70, width, dtype=dtype, generator=generator) * 3 + 5
    residual = torch.randn(70, width, dtype=dtype, generator=generator) if with_residual else None
    norm = kernels.norm(weight, bias, 1e-5)
    s = x.double() + (0 if residual is None else residual.double())
    centred = s - s.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    for rows in (0, 1, 15, 16, 17, 70):
        got = norm(x[:rows], None if residual is None else residual[:rows])
        bound = TOLERANCE[dtype] * 10 * max(expected.abs().max().item(), 1)
        assert torch.allclose(got.double(), expected[:rows], rtol=0, atol=bound)
    assert torch.equal(norm(x.t().contiguous().t()), norm(x)), "rows of another layout"


@pytest.mark.parametrize("width", [1, 7, 33, 576])
def test_the_root_mean_squares_norm_equals_the_definition(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(width, dtype=dtype, generator=generator)
    x, residual = (torch.randn(70, width, dtype=dtype, generator=generator) * 3 + 5 for _ in range(2))
    norm = kernels.rms_norm(weight, 1e-5)
    for added in (None, residual):
        s = x.double() + (0 if added is None else added.double())
        expected = s / (s.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
        for rows in (0, 1, 15, 16, 17, 70):
            got = norm(x[:rows], None if added is None else added[:rows])
            assert torch.allclose(
                got.double(), expected[:rows], rtol=0, atol=TOLERANCE[dtype] * 10 * max(expected.abs().max().item(), 1)
            )


def test_a_root_mean_square_that_overflows_is_not_finite(numba: NumbaKernels) -> None:
    x = torch.randn(4, 64)
    x[1], x[2, 5], x[3, 6] = torch.randn(64) * 1e25, torch.inf, torch.nan
    assert torch.isfinite(numba.rms_norm(torch.ones(64), 1e-5)(x)).all(dim=1).tolist() == [True, False, False, False]


@pytest.mark.parametrize("activation", ["silu", "gelu_new", "gelu", "relu"])
def test_a_gated_layer_equals_the_definition_at_every_number_of_rows(
    kernels: Kernels, dtype: torch.dtype, activation: Activation
) -> None:
    generator = torch.Generator().manual_seed(6)
    weight, bias = (torch.randn(*shape, dtype=dtype, generator=generator) for shape in ((2 * 50, 33), (2 * 50,)))
    x = torch.randn(70, 33, dtype=dtype, generator=generator)
    activated = {"silu": F.silu, "gelu_new": lambda t: F.gelu(t, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}
    down = kernels.linear(torch.randn(33, 50, dtype=dtype, generator=generator), None)
    for with_bias in (None, bias):
        both = x.double() @ weight.double().t() + (0 if with_bias is None else with_bias.double())
        expected = activated[activation](both[:, :50]) * both[:, 50:]
        gated = kernels.gated(weight, with_bias, activation)
        for rows in (0, 1, 15, 16, 17, 70):
            got = gated(x[:rows])
            assert_close(got, expected[:rows])
            assert torch.equal(down(got), down(got.contiguous())), "the next layer takes it as it lies"


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 16), (12, 64), (5, 14)])
def test_heads_are_rotated_by_their_tokens_angles(
    kernels: Kernels, dtype: torch.dtype, heads: int, head_dim: int
) -> None:
    generator = torch.Generator().manual_seed(heads)
    for tokens in (0, 1, 16, 33):
        fused = torch.randn(tokens, heads + 2, head_dim, dtype=dtype, generator=generator)
        angles = torch.rand(tokens, head_dim // 2, dtype=torch.float64, generator=generator) * 99
        cos, sin = 0.9 * angles.cos(), 0.9 * angles.sin()
        pairs = torch.view_as_complex(torch.stack(fused[:, :heads].double().chunk(2, dim=-1), dim=-1).contiguous())
        turned = pairs * torch.complex(cos, sin)[:, None]
        expected, rest = torch.cat([turned.real, turned.imag], dim=-1), fused[:, heads:].clone()
        assert_close(kernels.rotate(fused[:, :heads], cos.to(dtype), sin.to(dtype)), expected)
        assert torch.equal(fused[:, heads:], rest), "what lies behind the heads is not touched"


def test_norm_of_a_row_that_overflows_is_not_finite(numba: NumbaKernels) -> None:
    x = torch.randn(4, 64)
    x[1], x[2, 5], x[3, 6] = torch.randn(64) * 1e25, torch.inf, torch.nan
    got = numba.norm(torch.ones(64), torch.zeros(64), 1e-5)(x)
    assert torch.isfinite(got).all(dim=1).tolist() == [True, False, False, False]


def test_norm_refuses_other_shapes_and_types(numba: NumbaKernels) -> None:
    norm = numba.norm(torch.ones(8), torch.zeros(8), 1e-5)
    fits = torch.ones(2, 8)
    for x, residual in ((torch.ones(2, 9), None), (fits.double(), None), (fits, torch.ones(3, 8))):
        with pytest.raises(ValueError, match="expected"):
            norm(x, residual)


@pytest.mark.parametrize("shape", [(96, 32), (50, 33), (1, 1), (127, 1025), (33, 7), (12, 2048)], ids=str)
def test_linear_equals_the_definition_at_every_number_of_rows(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, dtype=dtype, generator=generator)
    bias = torch.randn(shape[0], dtype=dtype, generator=generator)
    x = torch.randn(70, shape[1], dtype=dtype, generator=generator)
    with_bias, bare = kernels.linear(weight, bias), kernels.linear(weight, None)
    expected = x.double() @ weight.double().t()
    for rows in range(71):
        assert_close(with_bias(x[:rows]), expected[:rows] + bias.double())
    assert_close(bare(x), expected)
    assert_close(bare(x.t().contiguous().t()), expected)
    assert_close(bare(torch.cat([x, x], dim=1)[::3, : shape[1]]), expected[::3])


@pytest.mark.parametrize("outs", [1, 50, 96])
def test_linear_adds_to_a_residual(kernels: Kernels, dtype: torch.dtype, outs: int) -> None:
    generator = torch.Generator().manual_seed(9)
    weight, x, wide = (
        torch.randn(*shape, dtype=dtype, generator=generator) for shape in ((outs, 33), (80, 33), (80, outs + 5))
    )
    residual = wide[:, 3 : outs + 3]  # rows of another stride than the result's
    linear = kernels.linear(weight, weight[:, 0].contiguous(), "relu")
    for rows in (1, 2, 3, 7, 80):
        assert torch.equal(linear(x[:rows], residual[:rows]), residual[:rows] + linear(x[:rows]))


def test_a_set_that_may_take_weights_gives_up_those_that_are_alone_in_their_memory() -> None:
    kernels = NumbaKernels(threads=1, take_weights=True)
    alone, part, x = torch.randn(20, 8), torch.randn(40, 8)[:20], torch.randn(3, 8)
    for weight in (alone, part):
        expected = x.double() @ weight.double().t()
        assert_close(kernels.linear(weight, None)(x), expected)
    assert (alone.untyped_storage().nbytes(), part.untyped_storage().nbytes()) == (0, 40 * 8 * 4)
    kernels.close()


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_gives_the_weights_rows_whether_a_head_holds_them_or_not(
    kernels: Kernels, dtype: torch.dtype, tied: bool
) -> None:
    weight = torch.randn(75, 9, dtype=dtype, generator=torch.Generator().manual_seed(10))
    ids = torch.tensor([0, 74, 15, 16, 15, 63])
    embedding = kernels.embedding(weight, kernels.linear(weight, None) if tied else None)
    assert torch.equal(embedding(ids), weight[ids])
    assert embedding(ids[:0]).shape == (0, 9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_applies_its_activation_over_the_whole_range(
    kernels: Kernels, dtype: torch.dtype, activation: Activation
) -> None:
    x = torch.cat([torch.linspace(-9, 9, 5003), torch.tensor([-1e30, -1e4, -90.0, 0.0, 90.0, 1e4])]).to(dtype)[:, None]
    got = kernels.linear(torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype), activation)(x)
    exact = x.double()
    expected = {
        "none": exact,
        "gelu_new": F.gelu(exact, approximate="tanh"),
        "gelu": F.gelu(exact),
        "relu": exact.relu(),
        "silu": exact * torch.sigmoid(exact),
    }[activation]
    assert_close(got[:5003], expected[:5003])
    assert torch.allclose(got[5003:].double(), expected[5003:], rtol=1e-6, atol=1e-6)


def test_attention_equals_the_definition_on_random_ragged_batches(kernels: Kernels, dtype: torch.dtype) -> None:
    rng = random.Random(1)
    for trial in range(24):
        causal = trial % 3 != 0
        heads, kv_heads, head_dim = rng.choice([(3, 3, 16), (2, 2, 64), (1, 1, 20), (4, 2, 7), (9, 3, 64), (6, 1, 33)])
        case = make_case(
            rng, random_rows(rng, causal), dtype=dtype, block_size=rng.choice(BLOCK_SIZES), heads=heads,
            kv_heads=kv_heads, head_dim=head_dim, causal=causal,
        )  # fmt: skip
        assert_close(attend(kernels, case), naive_attention(case.qkv[:, 0], case, 1))


def test_attention_with_a_bias_by_distance_equals_the_definition(kernels: Kernels, dtype: torch.dtype) -> None:
    """Rows shorter and longer than the table reaches, and prefixes that stand before the tokens or nowhere."""
    rng, generator = random.Random(12), torch.Generator().manual_seed(12)
    for trial in range(16):
        causal, reach = trial % 2 == 0, rng.choice((1, 6, 128))
        rows = []
        for row in random_rows(rng, causal):
            own = row.own if causal else row.count  # an encoder's tokens are all of the call
            if row.prefix + own:
                rows.append(replace(row, own=own, unplaced=rng.choice((0, row.prefix))))
        heads, kv_heads, head_dim = rng.choice([(3, 3, 16), (2, 2, 64), (4, 2, 7)])
        case = make_case(
            rng, rows, dtype=dtype, block_size=rng.choice(BLOCK_SIZES), heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, causal=causal,
        )  # fmt: skip
        bias = torch.randn(heads, 2 * reach + 1, dtype=dtype, generator=generator) * 3
        scores = Scores(rng.choice((1.0, 0.5)), bias)
        got = kernels.prepare(case.cache, case.batch, scores).attend(1, case.qkv[:, 0])
        assert_close(got, naive_attention(case.qkv[:, 0], case, 1, scores))


def test_a_scale_alone_is_followed(kernels: Kernels, dtype: torch.dtype) -> None:
    case = make_case(random.Random(13), [Row(5, 20, 7), Row(0, 30, 1)], dtype=dtype, causal=False)
    scores = Scores(1.0)
    got = kernels.prepare(case.cache, case.batch, scores).attend(1, case.qkv[:, 0])
    assert_close(got, naive_attention(case.qkv[:, 0], case, 1, scores))


def test_with_a_bias_too_a_row_does_not_depend_on_its_neighbours(numba: NumbaKernels) -> None:
    case = make_case(random.Random(3), [Row(5, 20, 7, 5), Row(17, 8, 1), Row(0, 1, 0)], heads=2)
    scores = Scores(1.0, torch.randn(2, 9))
    together = numba.prepare(case.cache, case.batch, scores).attend(1, case.qkv[:, 0])
    one = slice(1, 2)
    tables, lengths, unplaced = case.batch.tables[one], case.batch.lengths[one], case.batch.unplaced[one]
    alone = PagedBatch(tables, lengths, unplaced, case.batch.slots[7:], (1,), (17, 8))
    assert torch.equal(numba.prepare(case.cache, alone, scores).attend(1, case.qkv[7:, 0]), together[7:])


def test_a_row_without_any_key_gives_zeros_and_harms_nobody(numba: NumbaKernels) -> None:
    case = make_case(random.Random(9), [Row(0, 0, 2), Row(5, 0, 2), Row(0, 0, 0)], causal=False)
    got = attend(numba, case)
    assert torch.equal(got[:2], torch.zeros(2, 3, 16))
    assert_close(got, naive_attention(case.qkv[:, 0], case, 1))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_decode_rows_see_their_whole_prefix(
    kernels: Kernels, dtype: torch.dtype, prefix: int, block_size: int
) -> None:
    rows = [Row(prefix, 1, 1), Row(0, 50, 1), Row(prefix, block_size, 1), Row(prefix, block_size + 1, 1)]
    case = make_case(random.Random(prefix), rows, dtype=dtype, block_size=block_size)
    assert_close(attend(kernels, case), naive_attention(case.qkv[:, 0], case, 1))


def test_keys_and_values_land_at_their_slots_and_nowhere_else(kernels: Kernels, dtype: torch.dtype) -> None:
    case = make_case(random.Random(2), [Row(5, 40, 40), Row(0, 3, 0), Row(16, 9, 1)], dtype=dtype, block_size=8)
    before = KVCache(case.cache.keys.clone(), case.cache.values.clone())
    kernels.prepare(case.cache, case.batch).write(1, case.qkv[:, 1], case.qkv[:, 2])
    block, offset = case.batch.slots // 8, case.batch.slots % 8
    for pool, old, written in ((case.cache.keys, before.keys, 1), (case.cache.values, before.values, 2)):
        old[1][block, :, offset] = case.qkv[:, written]
        assert torch.equal(pool.nan_to_num(7), old.nan_to_num(7))


def test_a_row_does_not_depend_on_its_neighbours_to_the_last_bit(numba: NumbaKernels) -> None:
    """Stronger than the contract asks: tiles of different shapes add in the same order."""
    generator = torch.Generator().manual_seed(3)
    linear = numba.linear(torch.randn(100, 77, generator=generator), None, "gelu_new")
    x = torch.randn(9, 77, generator=generator)
    assert all(torch.equal(linear(x[row : row + 1])[0], linear(x)[row]) for row in range(9))
    rows = [Row(5, 20, 7), Row(17, 8, 1), Row(0, 1, 0), Row(1, 40, 40)]
    for heads, kv_heads in ((2, 2), (6, 2), (5, 1)):
        case = make_case(random.Random(3), rows, heads=heads, kv_heads=kv_heads, head_dim=20)
        together = attend(numba, case)
        tables, lengths, unplaced = case.batch.tables[:1], case.batch.lengths[:1], case.batch.unplaced[:1]
        alone = PagedBatch(tables, lengths, unplaced, case.batch.slots[:7], (7,), (5, 20))
        assert torch.equal(numba.prepare(case.cache, alone).attend(1, case.qkv[:7, 0]), together[:7])


def test_heads_that_share_a_key_head_give_what_each_gives_alone_to_the_last_bit(numba: NumbaKernels) -> None:
    for rows in ([Row(5, 20, 7), Row(17, 8, 1)], [Row(3, 9, 1)] * 5):
        shared = make_case(random.Random(5), rows, heads=6, kv_heads=2, head_dim=20)
        together = attend(numba, shared)
        cache = KVCache(*(pool.repeat_interleave(3, dim=2) for pool in (shared.cache.keys, shared.cache.values)))
        assert torch.equal(numba.prepare(cache, shared.batch).attend(1, shared.qkv[:, 0]), together)


def test_what_is_large_enough_to_share_gives_the_same_as_alone(numba: NumbaKernels) -> None:
    """Big enough for the worker thread to take chunks, again and again, also while it has gone to sleep."""
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(1500, 512, generator=generator), torch.randn(130, 512, generator=generator)
    single = NumbaKernels(torch.float32, threads=1)
    expected, linear = single.linear(weight, None)(x), numba.linear(weight, None)
    for repeat in range(60):
        assert torch.equal(linear(x[: 130 - repeat % 5]), expected[: 130 - repeat % 5])
        if repeat % 20 == 0:
            threading.Event().wait(0.02)
    case = make_case(random.Random(4), [Row(17, 200, 1), Row(100, 41, 40), Row(0, 300, 9)], heads=8, head_dim=64)
    assert torch.equal(attend(numba, case), attend(single, case))
    single.close()


def test_several_threads_may_use_one_kernel_set(numba: NumbaKernels) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(600, 256, generator=generator)
    inputs = [torch.randn(rows, 256, generator=generator) for rows in (1, 5, 33, 64)]
    linear, wrong = numba.linear(weight, None), []
    expected = [linear(x) for x in inputs]

    def work(index: int) -> None:
        for _ in range(100):
            if not torch.equal(linear(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_kernel_is_compiled_after_the_set_is_made(numba: NumbaKernels) -> None:
    from server.engine.kernels.numba import attention as numba_attention
    from server.engine.kernels.numba import pool as numba_pool

    compiled = (numba_attention.write_blocks, numba_attention.fill_tiles, numba_pool._run)
    before = [len(function.signatures) for function in compiled]
    for rows in ([Row(0, 1, 1)], [Row(5, 40, 40), Row(3, 2, 1)]):  # a view of one token is contiguous, of two it is not
        case = make_case(random.Random(6), rows)
        numba.prepare(case.cache, case.batch).write(0, case.qkv[:, 1], case.qkv[:, 2])
        attend(numba, case)
        numba.linear(torch.ones(4, 48), None)(case.qkv[:, 0].reshape(-1, 48))
    assert [len(function.signatures) for function in compiled] == before


def test_the_kernel_set_fits_device_and_dtype() -> None:
    assert select_kernels("cpu", torch.float32).name == "numba"
    assert select_kernels("cpu", torch.float64, threads=1).name == "numba"
    assert select_kernels("cpu", torch.bfloat16).name == "torch"
    assert select_kernels("cuda", torch.float32).name == "torch"
    assert select_kernels("cpu", torch.float32, "torch").name == "torch"
    with pytest.raises(ValueError, match="expected one of auto, torch, numba, got 'triton'"):
        select_kernels("cpu", torch.float32, "triton")
    with pytest.raises(ValueError, match=r"numba expects float32 or float64 on cpu, got torch\.float16"):
        select_kernels("cpu", torch.float16, "numba")


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cpu", torch.float32, "torch"),
        ("cpu", torch.float64, "torch"),
        ("cpu", torch.bfloat16, "auto"),
        ("cuda", torch.float32, "auto"),
        ("cuda:1", torch.bfloat16, "auto"),
        ("cuda", torch.float16, "torch"),
    ],
)
def test_a_set_whose_sums_depend_on_the_number_of_rows_is_not_deterministic(
    device: str, dtype: torch.dtype, name: str
) -> None:
    expected = rf"deterministic: expected numba kernels .*, got torch for {dtype} on {device}$"
    with pytest.raises(ValueError, match=expected):
        select_kernels(device, dtype, name, deterministic=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
def test_a_rows_bits_do_not_depend_on_the_number_of_rows(dtype: torch.dtype) -> None:
    """Bit for bit at a real model's sizes, whatever the threads: what ``deterministic`` promises of a layer."""
    generator = torch.Generator().manual_seed(8)
    weight, x = (torch.randn(*shape, dtype=dtype, generator=generator) for shape in ((768, 1100), (130, 1100)))
    expected: list[torch.Tensor] = []
    for threads in (1, 2):
        kernels = select_kernels("cpu", dtype, threads=threads, deterministic=True)
        linear, norm = kernels.linear(weight, weight[:, 0], "gelu_new"), kernels.norm(weight[0], weight[1], 1e-5)
        both = torch.cat([linear(x), norm(x, x.flip(0))], dim=1)
        for rows in (1, 2, 3, 4, 5, 8, 33, 64, 65, 129):
            part = torch.cat([linear(x[:rows]), norm(x[:rows], x.flip(0)[:rows])], dim=1)
            assert torch.equal(part, both[:rows]), rows
        expected.append(both)
        kernels.close()  # type: ignore[attr-defined]
    assert torch.equal(*expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
def test_among_equals_the_first_tokens_win_however_many_are_asked_for(
    kernel_sets: KernelsFor, dtype: torch.dtype
) -> None:
    """A beam group's candidates are taken from a list as long as the step's widest group needs."""
    kernels = kernel_sets["numba", dtype]
    logits = torch.randint(0, 4, (6, 700), generator=torch.Generator().manual_seed(9)).float()
    values, ids = kernels.top_log_probs(logits, 40)
    for count in (1, 2, 7, 39):
        fewer = kernels.top_log_probs(logits[2:3], count)
        assert torch.equal(fewer[0][0], values[2, :count])
        assert torch.equal(fewer[1][0], ids[2, :count])


def test_tensors_that_do_not_fit_are_refused(numba: NumbaKernels) -> None:
    linear = numba.linear(torch.ones(4, 3), None)
    with pytest.raises(ValueError, match=r"activations: expected torch.float32 \(2, 3\) on cpu, got .*\(2, 4\)"):
        linear(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"expected torch.float32 .* got torch.float64"):
        linear(torch.ones(2, 3, dtype=torch.float64))
    case = make_case(random.Random(8), [Row(5, 9, 2)])
    prepared = numba.prepare(case.cache, case.batch)
    with pytest.raises(ValueError, match=r"key: expected torch.float32 \(2, 3, 16\) on cpu, got .*\(1, 3, 16\)"):
        prepared.write(0, case.qkv[:1, 1], case.qkv[:, 2])
    with pytest.raises(ValueError, match=r"value: expected torch.float32 .* got torch.float64"):
        prepared.write(0, case.qkv[:, 1], case.qkv[:, 2].double())
    with pytest.raises(ValueError, match="query: expected 2 tokens as the batch counts, got 1"):
        prepared.attend(0, case.qkv[:1, 0])
    with pytest.raises(ValueError, match=r"query: expected torch.float32 .* got torch.float64"):
        prepared.attend(0, case.qkv[:, 0].double())
    with pytest.raises(ValueError, match=r"bias: expected torch.float32 .* got torch.float64"):
        numba.prepare(case.cache, case.batch, Scores(1.0, torch.zeros(3, 5).double()))
    with pytest.raises(ValueError, match=r"bias: expected torch.float32 \(3, 5\) on cpu, got .*\(3, 4\)"):
        numba.prepare(case.cache, case.batch, Scores(1.0, torch.zeros(3, 4)))
    with pytest.raises(ValueError, match="query: expected 2 heads as the bias has, got 3"):
        numba.prepare(case.cache, case.batch, Scores(1.0, torch.zeros(2, 5))).attend(0, case.qkv[:, 0])


def test_tables_that_point_outside_of_the_pool_are_refused_before_any_layer_runs(numba: NumbaKernels) -> None:
    case = make_case(random.Random(8), [Row(5, 9, 2)])
    blocks = case.cache.keys.shape[1]
    bad: list[tuple[str, dict[str, Any]]] = [
        (rf"slots: expected 0 to {blocks * 16 - 1}, got 0 to 1000000000", {"slots": torch.tensor([0, 10**9])}),
        (rf"slots: expected 0 to {blocks * 16 - 1}, got -1 to 0", {"slots": torch.tensor([0, -1])}),
        (rf"block tables: expected blocks 0 to {blocks - 1}, got 99 to 99", {"tables": case.batch.tables * 0 + 99}),
        (r"lengths: expected 0 to \d+ for these tables, got 5 to 999", {"lengths": torch.tensor([[5, 999]]).int()}),
        (r"lengths: expected at least the call's own \[2\], got \[1\]", {"lengths": torch.tensor([[5, 1]]).int()}),
        (r"tables and lengths: expected 2 rows, got \(1, 2, \d+\)", {"counts": (1, 1)}),
        (r"slots: expected torch.int64 .* got torch.int32", {"slots": case.batch.slots.int()}),
        (r"unplaced: expected 0 to \[5\] keys of a prefix, got \[6\]", {"unplaced": torch.tensor([6]).int()}),
    ]
    for says, change in bad:
        with pytest.raises(ValueError, match=says):
            numba.prepare(case.cache, replace(case.batch, **change))
    keys, values = case.cache.keys, case.cache.values
    for pool in (KVCache(keys.double(), values), KVCache(keys, values.transpose(2, 3))):
        with pytest.raises(ValueError, match=r"block pool: expected contiguous torch.float32, got"):
            numba.prepare(pool, case.batch)


def test_one_prepared_batch_serves_every_layer_of_a_call(kernels: Kernels, dtype: torch.dtype) -> None:
    case = make_case(random.Random(11), [Row(5, 20, 7), Row(17, 8, 1), Row(0, 40, 40)], dtype=dtype, layers=3)
    prepared = kernels.prepare(case.cache, case.batch)
    for layer in (0, 2, 1, 2):
        key, query = case.qkv[:, 1] + layer, case.qkv[:, 0] - layer
        prepared.write(layer, key, case.qkv[:, 2])
        assert_close(prepared.attend(layer, query), naive_attention(query, case, layer))
