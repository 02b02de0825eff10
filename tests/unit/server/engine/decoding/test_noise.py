"""Noise from a counter: SplitMix64's own numbers, a standard Gumbel, and nothing but its four arguments in it."""

from __future__ import annotations

import math

import pytest
import torch

from server.engine.decoding.noise import _mix, gumbel

MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The reference generator's output for its n-th call is ``splitmix64(seed + (n - 1) * GOLDEN)``."""
    state = (state + GOLDEN) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def key(seed: int, sample: int, position: int) -> int:
    """The state that a choice's tokens count from."""
    return _mix(_mix(_mix(seed * GOLDEN & MASK) ^ (sample * GOLDEN & MASK)) ^ ((position + 1) * GOLDEN & MASK))


def reference(seed: int, sample: int, position: int, token_id: int) -> float:
    """The same noise in Python integers."""
    word = _mix((key(seed, sample, position) + token_id * GOLDEN) & MASK)
    return -math.log(-math.log(((word >> 12) + 0.5) * 2.0**-52))


def test_the_mixer_is_splitmix64s() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the reference's first outputs for seed 0
    assert [splitmix64(index * GOLDEN & MASK) for index in range(3)] == published
    assert [_mix((index + 1) * GOLDEN & MASK) for index in range(3)] == published


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 12345678901234567])
@pytest.mark.parametrize(("sample", "position"), [(0, 0), (3, 0), (0, 7), (63, 100_000)])
def test_tensor_arithmetic_equals_python_integers(seed: int, sample: int, position: int) -> None:
    ids = torch.tensor([0, 1, 2, 999, 50256, 2**31])
    expected = [reference(seed, sample, position, int(token)) for token in ids]
    assert gumbel(seed, sample, position, ids).tolist() == pytest.approx(expected, rel=1e-14)


def test_known_answer() -> None:
    """Whoever changes these numbers changes every seeded answer that users have noted down."""
    known = [-0.33968349454342867, 3.666699474807555, 1.033890026705279]
    assert gumbel(42, 0, 0, torch.arange(3)).tolist() == pytest.approx(known, rel=1e-14)


def test_a_tokens_noise_depends_neither_on_its_neighbours_nor_on_their_order() -> None:
    whole = gumbel(5, 1, 9, torch.arange(1000))
    some = torch.tensor([999, 3, 500])
    assert torch.equal(gumbel(5, 1, 9, some), whole[some])
    assert torch.equal(gumbel(5, 1, 9, torch.arange(1000).view(10, 100)).flatten(), whole)


def test_every_argument_changes_the_noise() -> None:
    ids = torch.arange(100)
    base = gumbel(5, 1, 9, ids)
    for other in (gumbel(6, 1, 9, ids), gumbel(5, 2, 9, ids), gumbel(5, 1, 10, ids), gumbel(1, 5, 9, ids)):
        assert not bool((base == other).any())


@pytest.mark.parametrize("word", [0, MASK])
def test_the_smallest_and_the_largest_hash_give_finite_noise(word: int) -> None:
    """53 bits and a half round to 1 at the top, and the noise to infinity: that token would win whatever its score.

    No small token id has such a hash; the one that has is found by running SplitMix64 backwards."""
    state = word ^ (word >> 31) ^ (word >> 62)
    state = state * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    state = state ^ (state >> 27) ^ (state >> 54)
    state = state * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    state = state ^ (state >> 30) ^ (state >> 60)
    assert _mix(state) == word
    token = (state - key(5, 1, 9)) * pow(GOLDEN, -1, 1 << 64) & MASK
    [noise] = gumbel(5, 1, 9, torch.tensor([token - (1 << 64) if token >> 63 else token])).tolist()
    assert math.isfinite(noise)
    assert (noise > 30) == (word == MASK)


def test_the_noise_is_a_standard_gumbel() -> None:
    """Kolmogorov-Smirnov at the 0.1 % level, and mean and variance within five standard errors."""
    for noise in (gumbel(7, 0, 0, torch.arange(20_000)), torch.stack([
        gumbel(seed, seed % 3, position, torch.tensor([17])) for seed in range(100) for position in range(50)
    ]).flatten()):
        count = noise.numel()
        ordered = torch.exp(-torch.exp(-noise.sort().values))
        steps = torch.arange(1, count + 1, dtype=torch.float64) / count
        distance = max(float((steps - ordered).max()), float((ordered - steps + 1 / count).max()))
        assert distance < 1.95 / math.sqrt(count)
        variance = math.pi**2 / 6
        assert abs(float(noise.mean()) - 0.5772156649) < 5 * math.sqrt(variance / count)
        assert abs(float(noise.var()) - variance) < 5 * math.sqrt(4.4 * variance**2 / count)  # Gumbel's kurtosis is 5.4


@pytest.mark.parametrize("vary", ["seed", "position", "sample"])
def test_draws_follow_the_probabilities_whichever_counter_moves(vary: str) -> None:
    """Chi-square at the 0.1 % level over 2000 draws from five tokens."""
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.09, 0.01], dtype=torch.float64)
    ids, draws = torch.tensor([11, 50_000, 7, 0, 300]), 2000
    counts = torch.zeros(5)
    for index in range(draws):
        counters = {"seed": 3, "sample": 0, "position": 0, vary: index}
        noise = gumbel(counters["seed"], counters["sample"], counters["position"], ids)
        counts[int((probabilities.log() + noise).argmax())] += 1
    expected = probabilities * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.47  # four degrees of freedom


def test_neighbouring_counters_are_not_correlated() -> None:
    ids = torch.arange(5000)
    grid = torch.stack([gumbel(seed, sample, position, ids)
                        for seed in range(3) for sample in range(3) for position in range(3)])
    correlation = torch.corrcoef(grid) - torch.eye(27, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(5000)
