"""Artifacts with something wrong in them: every way we know to damage or to forge one, at random. Knows no test."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

EXTREMES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**40, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x" * 5000, "\ud800", "\x00", "../../etc/passwd", "NaN", [], {}, [[[]]], {"a": {"a": {}}},
    ["x"] * 200, "float32", "decoder",
)  # fmt: skip
"""Values for any place in a header."""
LENGTHS: Final = (0, 1, 2, 7, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)
CODES: Final = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I8", "U8", "BOOL", "C64", "f32", "")
NOT_FINITE: Final = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x00\x00\xc0\xff")
"""NaN and both infinities of float32."""

Mutation = Callable[[bytes, random.Random], bytes]


def mutants(data: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Without end: a kind and what became of ``data``, an artifact of float32; each kind in turn."""
    rng = random.Random(seed)
    while True:
        for mutation in MUTATIONS:
            made = mutation(data, rng)
            if rng.random() < 0.1:
                made = rng.choice(RAW)(made, rng)
            if made != data:
                yield mutation.__name__, made


# --- the bytes ---


def flipped_bits(data: bytes, rng: random.Random) -> bytes:
    return _flipped(data, rng, len(data))


def flipped_bits_in_the_header(data: bytes, rng: random.Random) -> bytes:
    return _flipped(data, rng, min(len(data), 8 + _header_length(data)))


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([rng.randrange(len(data) + 1), rng.randrange(min(len(data), 16) + 1), len(data) - 1])]


def with_a_tail(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice([1, 4, 8, 4096]))


def with_another_header_length(data: bytes, rng: random.Random) -> bytes:
    near = _header_length(data) + rng.choice([-8, -1, 1, 8])
    return struct.pack("<Q", rng.choice([*LENGTHS, near, near, rng.getrandbits(64)])) + data[8:]


def with_a_hole(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice([1, 8, 64, 1024])
    filling = rng.choice([b"", b"\0" * length, rng.randbytes(length), data[:length]])
    return data[:start] + filling + data[start + length :]


def of_other_bytes(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\x80\x04\x95", b"PK\x03\x04", b"{}", b"\xef\xbb\xbf"]) + rng.randbytes(rng.randrange(300))


def with_numbers_that_are_not_finite(data: bytes, rng: random.Random) -> bytes:
    start = 8 + _header_length(data)
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 20])):
        at = start + 4 * rng.randrange((len(data) - start) // 4)
        made[at : at + 4] = rng.choice(NOT_FINITE)
    return bytes(made)


# --- the header's JSON ---


def with_another_dtype(data: bytes, rng: random.Random) -> bytes:
    return _with_entry(data, rng, "dtype", lambda _: rng.choice([*CODES, *EXTREMES]))


def with_another_shape(data: bytes, rng: random.Random) -> bytes:
    def change(shape: list[Any]) -> Any:
        other = [*shape]
        other[rng.randrange(len(other))] = rng.choice(EXTREMES)
        return rng.choice([other, shape[::-1], [*shape, 1], shape[1:], [1 << 32, 1 << 32], rng.choice(EXTREMES)])

    return _with_entry(data, rng, "shape", change)


def with_other_offsets(data: bytes, rng: random.Random) -> bytes:
    def change(offsets: list[int]) -> Any:
        begin, end = offsets
        near = [begin + rng.choice([-4, -1, 1, 4]), end]
        return rng.choice([[end, begin], near, [begin, 1 << 62], [begin, (1 << 64) - 1], [0, 4], rng.choice(EXTREMES)])

    return _with_entry(data, rng, "data_offsets", change)


def with_other_names(data: bytes, rng: random.Random) -> bytes:
    header = _header(data)
    name = rng.choice([*header])
    entry = header.pop(name)
    for other in rng.choice([(), ("encoder.key",), ("x" * 3000,), ("",), (name, "cross.value"), (name.upper(),)]):
        header[other] = entry
    return _put(data, json.dumps(header))


def with_a_name_twice(data: bytes, rng: random.Random) -> bytes:
    header = _header(data)
    name = rng.choice([*header])
    other = header[rng.choice([*header])]
    text = json.dumps(header)
    return _put(data, text[:-1] + f", {json.dumps(name)}: {json.dumps(other)}}}")


def with_other_json(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(_header(data))
    deep = rng.choice([10, 127, 900, 5000, 100_000])
    return _put(data, rng.choice([
        "[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, "[]", "null", "7", '""', "{}",
        text + "{}", text[:-1], text.replace('"', "'"), "\ufeff" + text, text + " " * 1000,
        text.replace(":", ":" + "9" * 5000, 1),
    ]))  # fmt: skip


# --- the prefix's own metadata ---


def with_another_value_in_the_metadata(data: bytes, rng: random.Random) -> bytes:
    return _with_metadata(data, lambda metadata: _replace(metadata, rng))


def with_a_field_too_many_or_too_few(data: bytes, rng: random.Random) -> bytes:
    def change(metadata: dict[str, Any]) -> str:
        where = rng.choice([found for found in _containers(metadata) if isinstance(found, dict)])
        if where and rng.random() < 0.5:
            del where[rng.choice([*where])]
        else:
            where[rng.choice(["x", "", "__proto__", "length", "encoder", "num_beams"])] = rng.choice(EXTREMES)
        return json.dumps(metadata)

    return _with_metadata(data, change)


def with_other_defaults(data: bytes, rng: random.Random) -> bytes:
    def change(metadata: dict[str, Any]) -> str:
        names = ("temperature", "top_k", "num_beams", "stop", "seed", "max_new_tokens", "length_penalty", "unknown")
        metadata["defaults"] = {name: rng.choice(EXTREMES) for name in rng.sample(names, 2)}
        return json.dumps(metadata)

    return _with_metadata(data, change)


def with_a_field_of_the_metadata_twice(data: bytes, rng: random.Random) -> bytes:
    def change(metadata: dict[str, Any]) -> str:
        name = rng.choice([*metadata])
        return json.dumps(metadata)[:-1] + f", {json.dumps(name)}: {json.dumps(metadata[rng.choice([*metadata])])}}}"

    return _with_metadata(data, change)


RAW: Final[tuple[Mutation, ...]] = (flipped_bits, flipped_bits_in_the_header, truncated, with_a_tail)
MUTATIONS: Final[tuple[Mutation, ...]] = (
    *RAW, with_another_header_length, with_a_hole, of_other_bytes, with_numbers_that_are_not_finite,
    with_another_dtype, with_another_shape, with_other_offsets, with_other_names, with_a_name_twice, with_other_json,
    with_another_value_in_the_metadata, with_a_field_too_many_or_too_few, with_other_defaults,
    with_a_field_of_the_metadata_twice,
)  # fmt: skip


def _flipped(data: bytes, rng: random.Random, end: int) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if end:
            made[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(made)


def _header_length(data: bytes) -> int:
    length: int = struct.unpack_from("<Q", data)[0]
    return length


def _header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + _header_length(data)])
    return header


def _put(data: bytes, header: str) -> bytes:
    """The same tensors behind another header."""
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + _header_length(data) :]


def _with_entry(data: bytes, rng: random.Random, field: str, change: Callable[[Any], Any]) -> bytes:
    header = _header(data)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    entry[field] = change(entry[field])
    return _put(data, json.dumps(header))


def _with_metadata(data: bytes, change: Callable[[dict[str, Any]], str]) -> bytes:
    header = _header(data)
    (key,) = header["__metadata__"]
    header["__metadata__"][key] = change(json.loads(header["__metadata__"][key]))
    return _put(data, json.dumps(header))


def _replace(metadata: dict[str, Any], rng: random.Random) -> str:
    where = rng.choice([found for found in _containers(metadata) if found])
    place = rng.randrange(len(where)) if isinstance(where, list) else rng.choice([*where])
    where[place] = rng.choice(EXTREMES)
    return json.dumps(metadata)


def _containers(value: Any) -> Iterator[Any]:
    """Every object and list in ``value``, itself the first."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)
