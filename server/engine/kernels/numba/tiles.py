"""Register tiles and memory access, written as LLVM code where numba's own loops promise nothing.

Owns the intrinsics of the kernels. They use generic vectors only, so AVX2, AVX-512 and ARM compile from the same text.

Everything takes addresses instead of arrays. numba compiles anew for every array layout (a view of one token is
contiguous, of two it is not), and would do so inside a request; integers have one type. The first argument, ``zero``,
only gives the kernel's float type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from server.engine.kernels.numba.emitter import I64, Emitter
from server.engine.kernels.numba.jit import types, vector_bytes

VECTOR_BYTES = vector_bytes()
PANEL_BYTES = 2 * VECTOR_BYTES
"""A panel has, for each input in turn, the weights of so many bytes of outputs, which stand in two registers."""
TILE_ROWS = 6
"""Rows that a panel meets together: their sums take 12 of AVX2's 16 registers."""


@intrinsic
def itemsize(typing: Any, zero: Any) -> Any:
    """Bytes of one element, a constant of the compiled code."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return I64(signature.args[0].bitwidth // 8)

    return types.int64(zero), emit


@intrinsic
def pointer(typing: Any, zero: Any, address: Any) -> Any:
    """``address`` as a pointer to elements, for ``numba.carray``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(signature.args[0]).as_pointer())

    return types.CPointer(zero)(zero, types.int64), emit


def dot_tile(rows: int, columns: int, prefetch: bool = False) -> Any:
    """An intrinsic: ``out[r, c] (+)= sum_k x[r, k] w[c, k]`` for a tile that stays in registers.

    ``(zero, x, x_stride, w, w_stride, count, out, out_stride, accumulate)``: addresses and row strides are in bytes;
    elements of a row are contiguous; ``accumulate`` 0 overwrites ``out``. The order of additions does not depend on the
    tile's shape, so a row's result does not depend on its neighbours. ``prefetch`` fetches the next tile's weights: a
    gain if they come from memory, a loss if they are in the cache.
    """

    @intrinsic
    def tile(typing: Any, zero: Any, x: Any, xs: Any, w: Any, ws: Any, count: Any, out: Any, os_: Any, acc: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, x, x_stride, w, w_stride, count, out, out_stride, accumulate = arguments
            element = context.get_value_type(signature.args[0])
            size = 4 if element == ir.FloatType() else 8
            wide, narrow = Emitter(builder, element, VECTOR_BYTES // size), Emitter(builder, element, 1)
            x_rows = [builder.add(x, builder.mul(x_stride, I64(r))) for r in range(rows)]
            w_rows = [builder.add(w, builder.mul(w_stride, I64(c))) for c in range(columns)]
            next_tile = builder.mul(w_stride, I64(columns))

            def body(unit: Emitter) -> Callable[[Any, list[Any]], list[Any]]:
                def step(index: Any, sums: list[Any]) -> list[Any]:
                    offset = builder.mul(index, I64(size))
                    weights = [unit.load(builder.add(row, offset)) for row in w_rows]
                    for row in w_rows if prefetch and unit.lanes > 1 else []:
                        unit.prefetch(builder.add(builder.add(row, next_tile), offset))
                    result = []
                    for r, row in enumerate(x_rows):
                        value = unit.load(builder.add(row, offset))
                        result += [
                            unit.multiply_add(value, weight, sums[r * columns + c]) for c, weight in enumerate(weights)
                        ]
                    return result

                return step

            whole = builder.and_(count, I64(-wide.lanes))
            zeros = [ir.Constant(wide.type, None)] * (rows * columns)
            sums = [wide.total(v) for v in wide.loop(I64(0), whole, wide.lanes, zeros, body(wide))]
            sums = narrow.loop(whole, count, 1, sums, body(narrow))
            for r in range(rows):
                line = builder.add(out, builder.mul(out_stride, I64(r)))
                for c in range(columns):
                    place = builder.add(line, I64(c * size))
                    with builder.if_else(builder.icmp_signed("!=", accumulate, I64(0))) as (add, overwrite):
                        with add:
                            narrow.store(builder.fadd(narrow.load(place), sums[r * columns + c]), place)
                        with overwrite:
                            narrow.store(sums[r * columns + c], place)
            return context.get_dummy_value()

        i = types.int64
        return types.void(zero, i, i, i, i, i, i, i, i), emit

    return tile


def panel_tile(rows: int, panels: int) -> Any:
    """An intrinsic: ``out[r, :] (+)= sum_k x[r, k] w[k, :]`` for a tile that stays in registers.

    ``(zero, x, x_stride, w, w_stride, count, out, out_stride, accumulate, next, pace)``: addresses and strides are in
    bytes; ``w`` is ``panels`` panels, ``w_stride`` apart, as ``PANEL_BYTES`` says; ``accumulate`` 0 overwrites ``out``.
    Fetches what lies ``pace`` bytes further with each ``k``, beginning at ``next`` and as far apart as the panels. The
    order of additions does not depend on the tile's shape.
    """

    @intrinsic
    def tile(
        typing: Any, zero: Any, x: Any, xs: Any, w: Any, ws: Any, count: Any, out: Any, os_: Any, acc: Any, at: Any,
        pace: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, x, x_stride, w, w_stride, count, out, out_stride, accumulate, ahead, pace = arguments
            element = context.get_value_type(signature.args[0])
            size = 4 if element == ir.FloatType() else 8
            wide, narrow = Emitter(builder, element, VECTOR_BYTES // size), Emitter(builder, element, 1)
            x_rows = [builder.add(x, builder.mul(x_stride, I64(r))) for r in range(rows)]
            offsets = [builder.mul(w_stride, I64(panel)) for panel in range(panels)]
            places = [
                builder.add(builder.add(out, builder.mul(out_stride, I64(r))), I64(c * VECTOR_BYTES))
                for r in range(rows)
                for c in range(2 * panels)
            ]
            def step(index: Any, sums: list[Any]) -> list[Any]:
                line, fetched = builder.mul(index, I64(PANEL_BYTES)), builder.add(ahead, builder.mul(index, pace))
                weights = []
                for offset in offsets:
                    narrow.prefetch(builder.add(fetched, offset))
                    first = builder.add(builder.add(w, offset), line)
                    weights += [wide.load(first), wide.load(builder.add(first, I64(VECTOR_BYTES)))]
                result, column = [], builder.mul(index, I64(size))
                for r, row in enumerate(x_rows):
                    value = wide.broadcast(narrow.load(builder.add(row, column)))
                    part = sums[r * len(weights) : (r + 1) * len(weights)]
                    result += [wide.multiply_add(value, weight, s) for weight, s in zip(weights, part, strict=True)]
                return result

            sums = wide.loop(I64(0), count, 1, [ir.Constant(wide.type, None)] * len(places), step)
            with builder.if_else(builder.icmp_signed("!=", accumulate, I64(0))) as (add, overwrite):
                with add:
                    for place, value in zip(places, sums, strict=True):
                        wide.store(builder.fadd(wide.load(place), value), place)
                with overwrite:
                    for place, value in zip(places, sums, strict=True):
                        wide.store(value, place)
            return context.get_dummy_value()

        i = types.int64
        return types.void(zero, i, i, i, i, i, i, i, i, i, i), emit

    return tile


def mix_tile(rows: int, vectors: int) -> Any:
    """An intrinsic: ``out[r, :] (+)= sum_n p[r, n] v[n, :]``, ``vectors`` registers wide (0: one element wide).

    ``(zero, p, p_stride, v, v_stride, count, out, out_stride, accumulate)``, as in ``dot_tile``.
    """

    @intrinsic
    def tile(typing: Any, zero: Any, p: Any, ps: Any, v: Any, vs: Any, count: Any, out: Any, os_: Any, acc: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, p, p_stride, v, v_stride, count, out, out_stride, accumulate = arguments
            element = context.get_value_type(signature.args[0])
            size = 4 if element == ir.FloatType() else 8
            unit = Emitter(builder, element, VECTOR_BYTES // size if vectors else 1)
            narrow, width = Emitter(builder, element, 1), max(vectors, 1)
            p_rows = [builder.add(p, builder.mul(p_stride, I64(r))) for r in range(rows)]
            places = [
                builder.add(builder.add(out, builder.mul(out_stride, I64(r))), I64(c * unit.lanes * size))
                for r in range(rows)
                for c in range(width)
            ]
            keep = builder.icmp_signed("!=", accumulate, I64(0))
            empty = ir.Constant(unit.type, None)
            start = [builder.select(keep, unit.load(place), empty) for place in places]

            def step(index: Any, sums: list[Any]) -> list[Any]:
                line = builder.add(v, builder.mul(index, v_stride))
                values = [unit.load(builder.add(line, I64(c * unit.lanes * size))) for c in range(width)]
                result = []
                for r, row in enumerate(p_rows):
                    weight = unit.broadcast(narrow.load(builder.add(row, builder.mul(index, I64(size)))))
                    result += [unit.multiply_add(weight, value, sums[r * width + c]) for c, value in enumerate(values)]
                return result

            for place, value in zip(places, unit.loop(I64(0), count, 1, start, step), strict=True):
                unit.store(value, place)
            return context.get_dummy_value()

        i = types.int64
        return types.void(zero, i, i, i, i, i, i, i, i), emit

    return tile
