"""Digests over content. They name an artifact's version and a backbone's fingerprint.

Owns the length-delimited stream and the bytes of a tensor. Does not know what is hashed, or why.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import torch


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """``sha256:<hex>`` over ``parts`` in order, each after its length: different parts never give the same stream."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def tensor_parts(name: str, tensor: torch.Tensor) -> tuple[bytes | memoryview, ...]:
    """Name, dtype, shape and bytes of ``tensor``, as they enter a digest."""
    shape = ",".join(map(str, tensor.shape))
    return name.encode(), dtype_name(tensor).encode(), f"[{shape}]".encode(), tensor_bytes(tensor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, little-endian. A contiguous tensor on the CPU is not copied."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(tensor: torch.Tensor) -> str:
    """``float32`` and the like."""
    return str(tensor.dtype).removeprefix("torch.")
