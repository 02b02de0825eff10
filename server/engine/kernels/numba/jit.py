"""How every numba kernel is compiled: flags, the cache on disk, the machine's vector width. Knows no kernel."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numba.core.types

types: Any = numba.core.types  # its classes and instances confuse type checkers


def cache_folder(sources: Path = Path(__file__).parent) -> Path | None:
    """Where compiled kernels are kept: below NUMBA_CACHE_DIR or the XDG cache; None if that cannot be written.

    One folder per content of the kernels' ``sources``: numba itself checks only the outermost function's file, and
    would run a stale kernel after a change in a function that it calls.
    """
    version = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted(sources.glob("*.py")):
        version.update(source.read_bytes())
    root = os.environ.get("NUMBA_CACHE_DIR")
    xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = (Path(root) if root else Path(xdg).expanduser() / "prefixd" / "numba") / version.hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    return folder


_CACHE = cache_folder()
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def jit(fastmath: bool | set[str] = False) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compile a function to run without the GIL, and cache it on disk where that is possible."""

    def decorate(function: Callable[..., Any]) -> Any:
        options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        if _CACHE is None:
            return numba.njit(**options)(function)
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_CACHE)  # numba reads it when the decorator runs
        try:
            return numba.njit(cache=True, **options)(function)
        finally:
            numba.config.CACHE_DIR = before

    return decorate


def vector_bytes() -> int:
    """Width of this machine's vector registers."""
    if not IS_X86:
        return 16
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512bw"):  # without the latter there are no words of 16 bits
        return 64
    return 32 if features.get("avx2") else 16
