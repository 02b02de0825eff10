"""A GGUF file's metadata and tensors, as stored, read within bounds: a hostile file costs an error and no more.

Owns the format, versions 2 and 3, little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Knows no model and not what transformers makes of the file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Final, TypeVar

from prefixes.errors import BackboneError

T = TypeVar("T")

INSTALL: Final = "pip install 'prefixd[gguf]'"

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT: Final = "general.alignment"
_MOST_ITEMS: Final = 4_000_000
"""Of all arrays together. transformers takes some hundred bytes for each; vocabularies and merges have a million."""
_MOST_HEADER: Final = 512 << 20
_MOST_DIMENSIONS: Final = 4


@dataclass(frozen=True)
class GgufValue:
    """One value of the metadata. ``kind`` and ``raw`` are as stored; ``value`` is a number, a string or a list."""

    kind: int
    raw: memoryview
    value: Any


@dataclass(frozen=True)
class GgufTensor:
    """``shape`` as torch has it, the fastest dimension last. ``data`` are the stored bytes, in blocks of ``kind``."""

    kind: int
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The metadata's value, which has to be there without a ``default``. Raises BackboneError for another type."""
        found = self.metadata.get(key)
        if found is None and default is not None:
            return default
        if found is None or type(found.value) is not kind:
            got = "none" if found is None else repr(found.value)[:80]
            raise self.error(f"{key}: expected a value of type {kind.__name__}, got {got}")
        return found.value

    @property
    def quantized(self) -> bool:
        """Whether every matrix is stored in some 8 bits a value or fewer (Q8_0 has a scale beside them: 8.5)."""
        matrices = [tensor for tensor in self.tensors.values() if len(tensor.shape) > 1]
        return all(8 * len(tensor.data) < 9 * prod(tensor.shape) for tensor in matrices)

    def parts(self) -> Iterator[bytes | memoryview]:
        """What enters a digest: all metadata and all tensors by name, not their order and not where they lie."""
        for key, value in sorted(self.metadata.items()):
            yield from (key.encode(), struct.pack("<I", value.kind), value.raw)
        for name, tensor in sorted(self.tensors.items()):
            yield from (name.encode(), struct.pack("<I", tensor.kind), ",".join(map(str, tensor.shape)).encode())
            yield tensor.data

    def error(self, message: str) -> BackboneError:
        """``message`` about this file."""
        return _error(self.path, message)


def read_gguf(path: Path) -> GgufFile:
    """Read what lies where in the file; tensors stay on the disk. Raises BackboneError for all but a whole file."""
    try:
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise _error(path, f"expected a file to read, got: {error}") from error
    try:
        return _Reader(path, content).read()
    except UnicodeDecodeError as error:
        raise _error(path, f"expected names and strings in UTF-8, got {error.object[:20]!r}") from None


class _Reader:
    """Reads on from ``_at``; nothing behind the end or the greatest header."""

    def __init__(self, path: Path, content: memoryview) -> None:
        self._path, self._content, self._at, self._items = path, content, 0, 0

    def read(self) -> GgufFile:
        """The whole header, in its order."""
        magic = bytes(self._take(4))
        if magic != b"GGUF":
            raise self._error(f"expected it to begin with GGUF, got {magic!r}")
        version = self._scalar("I")
        if version not in (2, 3):
            raise self._error(f"version: expected 2 or 3, little-endian, got {version}")
        tensors, values = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, GgufValue] = {}
        for _ in range(values):
            key = self._string()
            if key in metadata:
                raise self._error(f"metadata: expected each key once, got {key[:80]!r} again")
            metadata[key] = self._value()
        places: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self._string()
            if name in places:
                raise self._error(f"tensors: expected each name once, got {name[:80]!r} again")
            places[name] = self._place(name)
        return GgufFile(self._path, metadata, self._tensors(places, metadata))

    def _take(self, size: int) -> memoryview:
        end = self._at + size
        if end > len(self._content):
            raise self._error(f"expected {size} more bytes at {self._at}, got {len(self._content) - self._at}")
        if end > _MOST_HEADER:
            raise self._error(f"expected metadata of {_MOST_HEADER} bytes at most, got {end}")
        taken, self._at = self._content[self._at : end], end
        return taken

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))
        return value

    def _string(self) -> str:
        return str(self._take(self._scalar("Q")), "utf-8")

    def _value(self) -> GgufValue:
        kind, begin = self._scalar("I"), self._at
        if kind == _ARRAY:
            value = self._array()
        else:
            value = self._single(kind)
        return GgufValue(kind, self._content[begin : self._at], value)

    def _single(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise self._error(f"metadata: expected a value of type 0 to 12, got {kind}; arrays of arrays are not read")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._scalar("I"), self._scalar("Q")
        self._items += count
        if self._items > _MOST_ITEMS:
            raise self._error(f"metadata: expected arrays of {_MOST_ITEMS} values at most, got {self._items}")
        return [self._single(kind) for _ in range(count)]

    def _place(self, name: str) -> tuple[int, tuple[int, ...], int]:
        count = self._scalar("I")
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise self._error(f"{name[:80]}: expected 1 to {_MOST_DIMENSIONS} dimensions, got {count}")
        shape = tuple(self._scalar("Q") for _ in range(count))[::-1]
        return self._scalar("I"), shape, self._scalar("Q")

    def _tensors(
        self, places: Mapping[str, tuple[int, tuple[int, ...], int]], metadata: Mapping[str, GgufValue]
    ) -> dict[str, GgufTensor]:
        """Those of ``places``, all inside the file and none in another: they take no more memory than the file says."""
        alignment = metadata[_ALIGNMENT].value if _ALIGNMENT in metadata else 32
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"{_ALIGNMENT}: expected a power of two, got {str(alignment)[:80]}")
        begin = -(-self._at // alignment) * alignment
        spans, tensors = [], {}
        for name, (kind, shape, offset) in places.items():
            first = begin + offset
            last = first + self._size(name, kind, shape)
            if offset % alignment or last > len(self._content):
                raise self._error(
                    f"{name[:80]}: expected its bytes before {len(self._content)} and from a multiple of {alignment}, "
                    f"got {first} to {last}"
                )
            spans.append((first, last))
            tensors[name] = GgufTensor(kind, shape, self._content[first:last])
        for (_, last), (first, _) in pairwise(sorted(spans)):
            if first < last:
                raise self._error(f"tensors: expected each in bytes of its own, got one at {first} within another")
        return tensors

    def _size(self, name: str, kind: int, shape: tuple[int, ...]) -> int:
        sizes = _block_sizes(self._path)
        if kind not in sizes:
            raise self._error(f"{name[:80]}: expected a tensor of a known type, got {kind}")
        values, size = sizes[kind]
        if min(shape) < 1 or shape[-1] % values:
            raise self._error(f"{name[:80]}: expected rows of a multiple of {values} values, got shape {list(shape)}")
        return prod(shape) // values * size

    def _error(self, message: str) -> BackboneError:
        return _error(self._path, message)


def _block_sizes(path: Path) -> Mapping[int, tuple[int, int]]:
    """Type of a tensor -> the values of a block, and its bytes."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise _error(path, f"expected the package gguf, found none: {INSTALL}") from None
    sizes: Mapping[int, tuple[int, int]] = GGML_QUANT_SIZES
    return sizes


def _error(path: Path, message: str) -> BackboneError:
    return BackboneError(f"GGUF file {path.name}: {message}")
