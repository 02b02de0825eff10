"""The register tile of int8 weights: products of 16-bit integers, summed two by two in 32 bits.

Owns one intrinsic. On x86 it uses ``pmaddwd``, which AVX2 has where it lacks sums of four products of bytes; elsewhere
the same in generic vectors.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from server.engine.kernels.numba.emitter import I64, Emitter
from server.engine.kernels.numba.jit import IS_X86, types
from server.engine.kernels.numba.tiles import VECTOR_BYTES

I8, I16, I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_PMADDWD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def _pairs(builder: Any, a: Any, b: Any, lanes: int) -> Any:
    """``a[2i] * b[2i] + a[2i + 1] * b[2i + 1]`` of ``2 * lanes`` int16 each: ``lanes`` int32."""
    if IS_X86 and 4 * lanes <= VECTOR_BYTES and lanes in _PMADDWD:
        kind = ir.FunctionType(ir.VectorType(I32, lanes), [ir.VectorType(I16, 2 * lanes)] * 2)
        return builder.call(get_or_insert_function(builder.module, kind, _PMADDWD[lanes]), [a, b])
    wide = ir.VectorType(I32, 2 * lanes)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(
            products, undefined, ir.Constant(ir.VectorType(I32, lanes), list(range(start, 2 * lanes, 2)))
        )
        for start in (0, 1)
    )
    return builder.add(even, odd)


def int8_tile(rows: int, panels: int) -> Any:
    """An intrinsic: ``out[r, :] = x_scales[r] * w_scales * sum_k x[r, k] w[k, :]`` for a tile that stays in registers.

    ``(zero, x, x_stride, w, w_stride, pairs, out, out_stride, x_scales, w_scales, next, pace)``: addresses and strides
    in bytes; ``x`` int16, ``w`` is ``panels`` int8 panels, ``w_stride`` apart, each of ``pairs`` pairs of inputs, as
    ``Int8Panels`` says; ``out`` and the scales are of the kernel's float type, as wide as float panels. Fetches what
    lies ``pace`` bytes further with each pair, beginning at ``next`` and as far apart as the panels.
    """

    @intrinsic
    def tile(
        typing: Any, zero: Any, x: Any, xs: Any, w: Any, ws: Any, pairs: Any, out: Any, os_: Any, x_scales: Any,
        w_scales: Any, at: Any, pace: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, x, x_stride, w, w_stride, pairs, out, out_stride, x_scales, w_scales, ahead, pace = arguments
            element = context.get_value_type(signature.args[0])
            size = 4 if element == ir.FloatType() else 8
            lanes = VECTOR_BYTES // size
            wide, narrow = Emitter(builder, element, lanes), Emitter(builder, element, 1)
            bytes_, words = ir.VectorType(I8, 2 * lanes), ir.VectorType(I16, 2 * lanes)
            integers = ir.VectorType(I32, lanes)
            x_rows = [builder.add(x, builder.mul(x_stride, I64(r))) for r in range(rows)]
            offsets = [builder.mul(w_stride, I64(panel)) for panel in range(panels)]
            undefined = ir.Constant(integers, ir.Undefined)
            first_lane = ir.Constant(integers, [0] * lanes)

            def weights_at(address: Any) -> Any:
                return builder.sext(builder.load(wide.pointer(address, bytes_), align=1), words)

            def pair_of(row: Any, offset: Any) -> Any:
                """One row's two inputs in every lane."""
                pair = builder.load(narrow.pointer(builder.add(row, offset), I32), align=4)
                spread = builder.insert_element(undefined, pair, I32(0))
                return builder.bitcast(builder.shuffle_vector(spread, undefined, first_lane), words)

            def step(index: Any, sums: list[Any]) -> list[Any]:
                line = builder.mul(index, I64(4 * lanes))
                fetched = builder.add(ahead, builder.mul(index, pace))
                weights = []
                for offset in offsets:
                    narrow.prefetch(builder.add(fetched, offset))
                    first = builder.add(builder.add(w, offset), line)
                    weights += [weights_at(first), weights_at(builder.add(first, I64(2 * lanes)))]
                result, column = [], builder.mul(index, I64(4))
                for r, row in enumerate(x_rows):
                    pair = pair_of(row, column)
                    result += [
                        builder.add(sums[r * len(weights) + c], _pairs(builder, pair, weight, lanes))
                        for c, weight in enumerate(weights)
                    ]
                return result

            zeros = [ir.Constant(integers, None)] * (rows * 2 * panels)
            sums = wide.loop(I64(0), pairs, 1, zeros, step)
            for r in range(rows):
                line = builder.add(out, builder.mul(out_stride, I64(r)))
                scale = wide.broadcast(narrow.load(builder.add(x_scales, I64(r * size))))
                for c in range(2 * panels):
                    place = I64(c * VECTOR_BYTES)
                    value = builder.sitofp(sums[r * 2 * panels + c], wide.type)
                    scaled = builder.fmul(builder.fmul(value, scale), wide.load(builder.add(w_scales, place)))
                    wide.store(scaled, builder.add(line, place))
            return context.get_dummy_value()

        i = types.int64
        return types.void(zero, i, i, i, i, i, i, i, i, i, i, i), emit

    return tile

