"""LLVM code over addresses, for the intrinsics of the tiles. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

I64 = ir.IntType(64)


class Emitter:
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
