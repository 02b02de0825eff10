"""Random noise from a counter, not from a stream.

The noise of a token depends on (seed, sample, position, token id) alone: not on the batch, the order of arrival,
preemption or the device. Owns the hash; knows no sampling.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on a Python integer."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(seed: int, sample: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64, for each of ``token_ids`` (int64, any shape).

    argmax(log p + gumbel) is a draw from p (the Gumbel-max trick; Maddison et al. 2014).
    """
    key = _mix(_mix(_mix(seed * _GOLDEN & _MASK) ^ (sample * _GOLDEN & _MASK)) ^ ((position + 1) * _GOLDEN & _MASK))
    x = token_ids * _signed(_GOLDEN) + _signed(key)  # int64 arithmetic wraps, as SplitMix64's does
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    x = x ^ _shift(x, 31)
    uniform = (_shift(x, 12).double() + 0.5) * 2.0**-52  # exact in float64, so strictly between 0 and 1
    return -torch.log(-torch.log(uniform))
