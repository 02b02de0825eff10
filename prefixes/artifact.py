"""The prefix artifact: one safetensors file, its digest, and every check between bytes and a usable prefix.

Owns the file: header, tensor names ``<site>.key`` and ``<site>.value``, canonical content. Knows no registry and no
backbone; ``spec.check_compatible`` says whether a prefix fits one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import safetensors
import torch

from prefixes.digest import digest_of, dtype_name, tensor_bytes, tensor_parts
from prefixes.errors import InvalidArtifact
from prefixes.spec import PrefixSpec
from prefixes.spec_json import canonical_json, parse_json, spec_from_dict, spec_to_dict

FORMAT_VERSION: Final = 1
MAX_HEADER_BYTES: Final = 1 << 20

_METADATA_KEY: Final = "prefixd"
_DTYPES: Final[Mapping[str, tuple[str, torch.dtype]]] = {
    "float64": ("F64", torch.float64),
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
}


@dataclass(frozen=True)
class Prefix:
    """A trained prefix: its metadata and, per site, ``<site>.key`` and ``<site>.value``.

    Each tensor is ``(layers, prefix_len, kv_heads, head_dim)`` in the dtype it was trained in.
    """

    spec: PrefixSpec
    tensors: Mapping[str, torch.Tensor]


def write_prefix(prefix: Prefix) -> bytes:
    """The artifact's bytes; equal content gives equal bytes. Raises InvalidArtifact for what reading would refuse."""
    check_prefix(prefix)
    header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: _metadata(prefix.spec)}}
    chunks, offset = [], 0
    for name in sorted(prefix.tensors):
        tensor, chunk = prefix.tensors[name], tensor_bytes(prefix.tensors[name])
        header[name] = {
            "dtype": _DTYPES[dtype_name(tensor)][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(chunk)],
        }
        offset += len(chunk)
        chunks.append(chunk)
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors to 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidArtifact(
            f"header: expected at most {MAX_HEADER_BYTES} bytes, got {len(text)}",
            expected=MAX_HEADER_BYTES,
            got=len(text),
        )
    return b"".join([struct.pack("<Q", len(text)), text, *chunks])


def read_prefix(data: bytes, *, expected_version: str | None = None) -> Prefix:
    """The prefix in ``data``, complete and validated. Its tensors share no memory with ``data``.

    Raises InvalidArtifact, saying expected and got, for bytes that are truncated, foreign, malformed or not finite, and
    for content of another version than ``expected_version``.
    """
    spec = read_spec(data)
    try:
        entries = safetensors.deserialize(data)  # checks offsets, overlaps and sizes against the dtypes
    except Exception as error:  # SafetensorError and anything else its parser raises: the bytes are at fault
        raise InvalidArtifact(f"artifact: expected a whole safetensors file, got: {str(error)[:200]}") from None
    by_code = dict(_DTYPES.values())
    tensors = {}
    for name, entry in entries:
        dtype = by_code.get(entry["dtype"])
        if dtype is None:
            raise InvalidArtifact(
                f"tensor {name[:80]!r}: expected dtype {' or '.join(sorted(by_code))}, got {entry['dtype']}",
                expected=sorted(by_code),
                got=str(entry["dtype"]),
            )
        raw = entry["data"]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry["shape"])
    prefix = Prefix(spec, tensors)
    check_prefix(prefix)
    if expected_version is not None and (version := version_of(prefix)) != expected_version:
        raise InvalidArtifact(
            f"digest: expected {expected_version}, got {version}", expected=expected_version, got=version
        )
    return prefix


def header_bytes(start: bytes) -> int:
    """How many bytes an artifact that begins with ``start`` has before its tensors. Raises InvalidArtifact."""
    (length,) = struct.unpack_from("<Q", start) if len(start) >= 8 else (0,)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise InvalidArtifact(
            f"header length: expected 2 to {MAX_HEADER_BYTES} bytes, got {length}",
            expected=MAX_HEADER_BYTES,
            got=length,
        )
    return 8 + int(length)


def read_spec(data: bytes) -> PrefixSpec:
    """The metadata from the header alone; the tensors may be missing. Raises InvalidArtifact."""
    if len(data) < 8:
        raise InvalidArtifact(f"artifact: expected at least 8 bytes, got {len(data)}", expected=8, got=len(data))
    (length,) = struct.unpack_from("<Q", data)
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise InvalidArtifact(
            f"header length: expected 2 to {min(MAX_HEADER_BYTES, len(data) - 8)} bytes, got {length}; "
            "the file is truncated or is no safetensors file",
            expected=min(MAX_HEADER_BYTES, len(data) - 8),
            got=length,
        )
    header = parse_json("safetensors header", bytes(data[8 : 8 + length]))
    fields = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(fields, dict) or fields.keys() != {_METADATA_KEY} or not isinstance(fields[_METADATA_KEY], str):
        raise InvalidArtifact(
            f"artifact: expected a safetensors file with exactly the metadata {_METADATA_KEY!r}, "
            f"got {sorted(key[:40] for key in fields)[:8] if isinstance(fields, dict) else 'none'}; "
            "files of other tools go through `prefixd prefixes import`"
        )
    metadata = parse_json("prefix metadata", fields[_METADATA_KEY])
    got = metadata.get("format_version") if isinstance(metadata, dict) else type(metadata).__name__
    if type(got) is not int or got != FORMAT_VERSION:
        raise InvalidArtifact(
            f"format version: expected {FORMAT_VERSION}, got {str(got)[:40]}",
            expected=FORMAT_VERSION,
            got=str(got)[:40],
        )
    return spec_from_dict({key: value for key, value in metadata.items() if key != "format_version"})


def version_of(prefix: Prefix) -> str:
    """``sha256:<hex>`` over the canonical content: the metadata, then the tensors by name.

    Each tensor gives its name, dtype, shape and bytes. Each part follows its length, so different contents never give
    the same stream.
    """
    parts: list[bytes | memoryview] = [_metadata(prefix.spec).encode()]
    for name in sorted(prefix.tensors):
        parts += tensor_parts(name, prefix.tensors[name])
    return digest_of(parts)


def check_prefix(prefix: Prefix) -> None:
    """Raise InvalidArtifact unless the tensors are finite and exactly those that the spec describes."""
    spec_to_dict(prefix.spec)
    expected = {f"{site}.{part}": sited for site, sited in prefix.spec.sites.items() for part in ("key", "value")}
    if expected.keys() != prefix.tensors.keys():
        got = sorted(name[:80] for name in prefix.tensors)[:16]
        raise InvalidArtifact(
            f"tensors: expected {', '.join(sorted(expected))}; got {', '.join(got) or 'none'}",
            expected=sorted(expected),
            got=got,
        )
    for name, sited in expected.items():
        tensor = prefix.tensors[name]
        shape = (sited.geometry.layers, sited.length, sited.geometry.kv_heads, sited.geometry.head_dim)
        if (dtype_name(tensor), tuple(tensor.shape)) != (sited.dtype, shape):
            raise InvalidArtifact(
                f"tensor {name!r}: expected {sited.dtype} {shape}, got {dtype_name(tensor)} {tuple(tensor.shape)}",
                expected={"dtype": sited.dtype, "shape": list(shape)},
                got={"dtype": dtype_name(tensor), "shape": list(tensor.shape)},
            )
        if not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise InvalidArtifact(
                f"tensor {name!r}: expected finite values, got {wrong} of {tensor.numel()} NaN or infinite",
                tensor=name,
                got=wrong,
            )


def _metadata(spec: PrefixSpec) -> str:
    return canonical_json({"format_version": FORMAT_VERSION, **spec_to_dict(spec)})
