"""Chooses between two implementations of a linear layer, per shape and number of rows, by measurement.

Owns the measurement and the choice; knows of a layer only that it can run either way. The winner depends on the
machine: torch's library is far from the memory bandwidth for few rows on some, and unbeaten for many rows on others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from server.engine.kernels.base import Activation

REPEATS = 5
TORCH_MUST_SAVE = 0.1  # of the time. Below that we keep ours: its results do not depend on a row's neighbours at all


class Choosable(Protocol):
    """A linear layer that can run either way; ``torch_buckets[b]`` is the choice for up to ``2**b`` rows."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: Activation
    torch_buckets: tuple[bool, ...]

    def by_torch(self, x: torch.Tensor) -> torch.Tensor: ...

    def by_numba(self, x: torch.Tensor) -> torch.Tensor: ...


def calibrate(layers: Sequence[Choosable], buckets: int, seconds: float) -> None:
    """Set ``torch_buckets`` of every layer; layers of equal shape are measured together and choose alike.

    Shapes get shares of ``seconds`` in proportion to their weights. A bucket with no time left chooses as the one
    before.
    """
    shapes: dict[tuple[object, ...], list[Choosable]] = {}
    for layer in layers:
        key = (*layer.weight.shape, layer.bias is None, layer.activation)
        shapes.setdefault(key, []).append(layer)
    total = sum(layer.weight.numel() for layer in layers)
    for group in shapes.values():
        choices = _choose(group, buckets, seconds * len(group) * group[0].weight.numel() / total)
        for layer in group:
            layer.torch_buckets = choices


def _choose(group: Sequence[Choosable], buckets: int, seconds: float) -> tuple[bool, ...]:
    weight = group[0].weight
    choices: list[bool] = []
    deadline = time.perf_counter() + seconds
    for bucket in range(buckets):
        if choices and time.perf_counter() >= deadline:
            choices.append(choices[-1])
            continue
        x = torch.randn(2**bucket, weight.shape[1], dtype=weight.dtype)
        ours = _fastest([layer.by_numba for layer in group], x)
        torchs = _fastest([layer.by_torch for layer in group], x)
        choices.append(torchs < ours * (1 - TORCH_MUST_SAVE))
    return tuple(choices)


def _fastest(functions: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> float:
    """Seconds of the fastest call. Each call takes another layer's weights, which the caches no longer hold."""
    best = float("inf")
    with torch.inference_mode():
        functions[-1](x)
        for repeat in range(REPEATS):
            start = time.perf_counter()
            functions[repeat % len(functions)](x)
            best = min(best, time.perf_counter() - start)
    return best
