"""Functions over elements that LLVM can vectorise: exp, the activations, sums and maxima. Owns no memory.

In float32, exp and erf are short polynomials without a branch or a call (sources beside them), accurate to a few units
in the last place. In float64 they are libm's, exact and slow, for tests that run the engine in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.extending import intrinsic, overload

from server.engine.kernels.numba.jit import jit, types
from server.engine.kernels.numba.tiles import pointer

NONE, GELU_NEW, GELU, RELU, SILU = 0, 1, 2, 3, 4

_F = np.float32
_ONE = _F(1)
_LOG2_E, _LN2_HIGH, _LN2_LOW = _F(1.44269504088896341), _F(0.693359375), _F(-2.12194440e-4)
_ROUND = _F(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer and leaves that integer in the low bits
_SMALLEST, _LARGEST = _F(-87), _F(87)
# Cephes expf.
_E5, _E4, _E3 = _F(1.9875691500e-4), _F(1.3981999507e-3), _F(8.3334519073e-3)
_E2, _E1, _E0 = _F(4.1665795894e-2), _F(1.6666665459e-1), _F(5.0000001201e-1)
# Eigen's rational erf, odd over even, on [-4, 4].
_ERF_LIMIT = _F(4)
_R13, _R11, _R9 = _F(-2.72614225801306e-10), _F(2.77068142495902e-08), _F(-2.10102402082508e-06)
_R7, _R5 = _F(-5.69250639462346e-05), _F(-7.34990630326855e-04)
_R3, _R1 = _F(-2.95459980854025e-03), _F(-1.60960333262415e-02)
_S8, _S6, _S4 = _F(-1.45660718464996e-05), _F(-2.13374055278905e-04), _F(-1.68282697438203e-03)
_S2, _S0 = _F(-7.37332916720468e-03), _F(-1.42647390514189e-02)
_GELU_CUBIC, _SQRT_2_PI, _SQRT_HALF = 0.044715, math.sqrt(2 / math.pi), math.sqrt(0.5)


@intrinsic
def _exponent(typing: Any, rounded: Any) -> Any:
    """``2 ** n`` as float32 from ``n + 1.5 * 2**23``: the integer in the low bits becomes the exponent."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        bits = builder.bitcast(arguments[0], i32)
        return builder.bitcast(builder.shl(builder.add(bits, i32(127)), i32(23)), ir.FloatType())

    return types.float32(types.float32), emit


def _exp(x: Any) -> Any:
    """``e ** x``: a name for compiled code, where ``_exp_for`` chooses by type. Python never runs it."""


def _erf(x: Any) -> Any:
    """The error function: a name for compiled code, where ``_erf_for`` chooses by type. Python never runs it."""


@overload(_exp, inline="always")
def _exp_for(x: Any) -> Any:
    def exp64(x: Any) -> Any:
        return math.exp(x)

    def exp32(x: Any) -> Any:
        x = min(max(x, _SMALLEST), _LARGEST)
        rounded = x * _LOG2_E + _ROUND
        n = rounded - _ROUND
        r = x - n * _LN2_HIGH - n * _LN2_LOW
        p = ((((_E5 * r + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _E0
        return (p * r * r + r + _ONE) * _exponent(rounded)

    return exp32 if x == types.float32 else exp64


@overload(_erf, inline="always")
def _erf_for(x: Any) -> Any:
    def erf64(x: Any) -> Any:
        return math.erf(x)

    def erf32(x: Any) -> Any:
        x = min(max(x, -_ERF_LIMIT), _ERF_LIMIT)
        s = x * x
        top = (((((_R13 * s + _R11) * s + _R9) * s + _R7) * s + _R5) * s + _R3) * s + _R1
        return x * top / ((((_S8 * s + _S6) * s + _S4) * s + _S2) * s + _S0)

    return erf32 if x == types.float32 else erf64


@jit(fastmath={"contract"})
def activate(zero: Any, address: int, count: int, bias: int, activation: int) -> None:
    """``x = activation(x + bias)`` over ``count`` elements at ``address``; ``bias`` 0 is none."""
    x = carray(pointer(zero, address), (count,))
    kind = type(zero)
    if bias:
        b = carray(pointer(zero, bias), (count,))
        for i in range(count):
            x[i] += b[i]
    if activation == GELU_NEW:
        for i in range(count):
            v = x[i]  # 0.5 v (1 + tanh(u)) = v / (1 + exp(-2 u)), without the cancellation
            x[i] = v / (kind(1) + _exp(kind(-2 * _SQRT_2_PI) * (v + kind(_GELU_CUBIC) * v * v * v)))
    elif activation == GELU:
        for i in range(count):
            x[i] = kind(0.5) * x[i] * (kind(1) + _erf(x[i] * kind(_SQRT_HALF)))
    elif activation == RELU:
        for i in range(count):
            x[i] = max(x[i], kind(0))
    elif activation == SILU:
        for i in range(count):
            x[i] = x[i] / (kind(1) + _exp(-x[i]))


@jit(fastmath={"contract"})
def exponentials(zero: Any, address: int, count: int, shift: Any) -> None:
    """``x = exp(x - shift)`` over ``count`` elements at ``address``; none of them may exceed ``shift``."""
    x = carray(pointer(zero, address), (count,))
    for i in range(count):
        x[i] = _exp(x[i] - shift)


@jit(fastmath={"contract", "reassoc", "nsz"})
def scaled_maximum(zero: Any, address: int, count: int, scale: Any) -> Any:
    """Multiply ``count >= 1`` elements by ``scale`` and return the greatest."""
    x = carray(pointer(zero, address), (count,))
    greatest = x[0] * scale
    for i in range(count):
        x[i] *= scale
        greatest = max(greatest, x[i])
    return greatest


@jit(fastmath={"contract"})
def add_by_distance(
    zero: Any, address: int, count: int, scale: Any, table: int, reach: int, first: int, position: int
) -> None:
    """``x[i] = scale * x[i] + table[reach + i - position]``, no further from the middle of the table than ``reach``.

    The elements before ``first`` are only multiplied.
    """
    x = carray(pointer(zero, address), (count,))
    bias = carray(pointer(zero, table), (2 * reach + 1,))
    near = min(max(first, position - reach), count)
    far = min(max(near, position + reach), count)
    for i in range(min(first, count)):
        x[i] *= scale
    for i in range(first, near):
        x[i] = scale * x[i] + bias[0]
    for i in range(near, far):
        x[i] = scale * x[i] + bias[reach + i - position]
    for i in range(far, count):
        x[i] = scale * x[i] + bias[2 * reach]


@jit(fastmath={"contract"})
def add_exponentials(zero: Any, address: int, count: int, shift: Any, sums: int) -> None:
    """``sums[i] += exp(x[i] - shift)``; none may exceed ``shift``.

    Each lane has its own sum: a flag that lets LLVM reorder one sum would let it reorder ``_exp`` too.
    """
    x, result = carray(pointer(zero, address), (count,)), carray(pointer(zero, sums), (count,))
    for i in range(count):
        result[i] += _exp(x[i] - shift)


@jit(fastmath={"contract", "reassoc", "nsz"})
def total(zero: Any, address: int, count: int) -> Any:
    """Sum of ``count`` elements at ``address``."""
    x = carray(pointer(zero, address), (count,))
    result = zero
    for i in range(count):
        result += x[i]
    return result
