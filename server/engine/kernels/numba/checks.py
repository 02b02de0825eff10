"""Checks of dtype, shape and device before a kernel follows a tensor's address. Knows no kernel."""

from __future__ import annotations

import torch


def check_tensor(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> None:
    """Raise ValueError unless ``tensor`` is ``dtype (shape)`` on the CPU."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{what}: expected {dtype} {shape} on cpu, got {got}")


def checked_heads(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """``tensor`` itself if a head's elements are contiguous (in a view of a fused qkv they are), else a copy."""
    check_tensor(tensor, dtype, shape, what)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def checked_rows(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], what: str) -> torch.Tensor:
    """``tensor`` itself if a row's elements are contiguous, else a copy."""
    check_tensor(tensor, dtype, shape, what)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def checked_table(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """``tensor``, contiguous."""
    check_tensor(tensor, dtype, tuple(tensor.shape), what)
    return tensor.contiguous()


def check_pool(pool: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless ``pool`` is ``dtype`` and contiguous."""
    if pool.dtype != dtype or not pool.is_contiguous():
        raise ValueError(f"block pool: expected contiguous {dtype}, got {pool.dtype}, strides {pool.stride()}")
