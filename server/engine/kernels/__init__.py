"""Implementations of the linear and attention interface of ``base``, and the choice between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # ``threads.configure_threads`` must be importable before torch is
    import torch

    from server.engine.kernels.base import Kernels, Quantization

__all__ = ["KERNEL_SETS", "chosen_quantization", "select_kernels"]

KERNEL_SETS = ("auto", "torch", "numba")


def select_kernels(
    device: torch.device | str,
    dtype: torch.dtype,
    name: str = "auto",
    threads: int | None = None,
    *,
    deterministic: bool = False,
    take_weights: bool = False,
    quantize: Quantization = "none",
) -> Kernels:
    """The kernel set ``name`` for tensors of ``dtype`` on ``device``.

    ``auto`` is numba for float32 and float64 on a CPU, else torch. ``threads`` bounds numba's own threads (None: the
    available cores). ``deterministic`` asks for one whose results of a row depend on nothing but the row, bit for bit:
    numba. Torch's do not promise that on any device: its matrix products sum in another order for another number of
    rows. ``take_weights``: nobody else needs the tensors that layers are bound to, so their memory may be given up one
    by one, as they are copied. ``quantize``: what is kept of weights; numba's alone have int8. Raises ValueError for an
    unknown name, for numba where it cannot run, and for torch where ``deterministic`` or int8 is asked for.
    """
    if name not in KERNEL_SETS:
        raise ValueError(f"kernels: expected one of {', '.join(KERNEL_SETS)}, got {name!r}")
    import torch

    from server.engine.kernels.torch_reference import TorchKernels

    suits = torch.device(device).type == "cpu" and dtype in (torch.float32, torch.float64)
    if name == "numba" and not suits:
        raise ValueError(f"kernels: numba expects float32 or float64 on cpu, got {dtype} on {device}")
    if name == "torch" or not suits:
        for asked, what in ((deterministic, "deterministic"), (quantize != "none", f"quantize {quantize}")):
            if asked:
                got = f"torch for {dtype} on {device}"
                raise ValueError(f"{what}: expected numba kernels (float32 or float64 on cpu), got {got}")
        return TorchKernels()
    from server.engine.kernels.numba.kernels import NumbaKernels  # compiles: seconds, unless cached

    return NumbaKernels(dtype, threads, take_weights=take_weights, quantize=quantize)


def chosen_quantization(
    asked: Literal["auto"] | Quantization,
    device: torch.device | str,
    dtype: torch.dtype,
    name: str = "auto",
    *,
    stored: bool,
) -> Quantization:
    """What ``asked`` means on this machine with the kernel set ``name``. Refuses nothing.

    ``auto`` is int8 for a backbone whose file has no more bits itself (``stored``), in float32 on a CPU; else none.
    """
    import torch

    if asked != "auto":
        return asked
    suits = name != "torch" and torch.device(device).type == "cpu" and dtype == torch.float32
    return "int8" if stored and suits else "none"
