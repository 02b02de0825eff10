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
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from server.engine.kernels.numba.jit import types, vector_bytes

I64 = ir.IntType(64)
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


class _Emitter:
    """LLVM code over addresses: ``lanes`` elements of one float type at a time."""

    def __init__(self, builder: Any, element: Any, lanes: int) -> None:
        self.builder, self.element, self.lanes = builder, element, lanes
        self.size = 4 if element == ir.FloatType() else 8
        self.type = ir.VectorType(element, lanes) if lanes > 1 else element
        suffix = f"f{self.size * 8}"
        name = f"llvm.fmuladd.{f'v{lanes}' if lanes > 1 else ''}{suffix}"
        self._fmuladd = get_or_insert_function(builder.module, ir.FunctionType(self.type, [self.type] * 3), name)

    def pointer(self, address: Any, of: Any) -> Any:
        return self.builder.inttoptr(address, of.as_pointer())

    def load(self, address: Any) -> Any:
        return self.builder.load(self.pointer(address, self.type), align=self.size)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.pointer(address, self.type), align=self.size)

    def prefetch(self, address: Any) -> None:
        """Fetch the cache line at ``address``, which will be read soon; any address is allowed."""
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        self.builder.call(function, [self.builder.inttoptr(address, byte), i32(0), i32(3), i32(1)])

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.call(self._fmuladd, [a, b, c])

    def broadcast(self, scalar: Any) -> Any:
        if self.lanes == 1:
            return scalar
        undefined, i32 = ir.Constant(self.type, ir.Undefined), ir.IntType(32)
        first = self.builder.insert_element(undefined, scalar, i32(0))
        mask = ir.Constant(ir.VectorType(i32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, undefined, mask)

    def total(self, vector: Any) -> Any:
        """Sum of the lanes, by halves."""
        i32, lanes = ir.IntType(32), self.lanes
        while lanes > 1:
            lanes //= 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            low, high = (
                self.builder.shuffle_vector(
                    vector, undefined, ir.Constant(ir.VectorType(i32, lanes), list(range(start, start + lanes)))
                )
                for start in (0, lanes)
            )
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, i32(0)) if self.lanes > 1 else vector

    def loop(
        self, start: Any, stop: Any, step: int, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """``for i in range(start, stop, step): carried = body(i, carried)``, values kept in registers."""
        builder, before = self.builder, self.builder.basic_block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index, values = builder.phi(I64), [builder.phi(value.type) for value in carried]
        index.add_incoming(start, before)
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
        builder.position_at_end(inside)
        results = body(index, list(values))
        index.add_incoming(builder.add(index, I64(step)), builder.basic_block)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, builder.basic_block)
        builder.branch(head)
        builder.position_at_end(after)
        return list(values)


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
            wide, narrow = _Emitter(builder, element, VECTOR_BYTES // size), _Emitter(builder, element, 1)
            x_rows = [builder.add(x, builder.mul(x_stride, I64(r))) for r in range(rows)]
            w_rows = [builder.add(w, builder.mul(w_stride, I64(c))) for c in range(columns)]
            next_tile = builder.mul(w_stride, I64(columns))

            def body(unit: _Emitter) -> Callable[[Any, list[Any]], list[Any]]:
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
            wide, narrow = _Emitter(builder, element, VECTOR_BYTES // size), _Emitter(builder, element, 1)
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
            unit = _Emitter(builder, element, VECTOR_BYTES // size if vectors else 1)
            narrow, width = _Emitter(builder, element, 1), max(vectors, 1)
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
