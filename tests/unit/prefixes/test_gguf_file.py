"""Reading GGUF files: whatever the bytes are, an error of ours is the worst that happens."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefixes.backbone import load_backbone
from prefixes.errors import BackboneError
from prefixes.gguf_file import read_gguf
from tests.support.gguf import save_tiny_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_tiny_gguf(path, kind=GGMLQuantizationType.Q8_0, num_hidden_layers=1)
    return path


def test_metadata_and_tensors_are_those_of_the_gguf_package(whole: Path) -> None:
    ours, theirs = read_gguf(whole), GGUFReader(whole)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: value.value for key, value in ours.metadata.items()} == {
        key: field.contents() for key, field in fields.items()
    }
    assert len(theirs.tensors) == len(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.kind, list(mine.shape)) == (tensor.tensor_type, tensor.shape.tolist()[::-1])
        assert mine.data == tensor.data.tobytes()


def header(tensors: int = 0, values: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def array(kind: int, count: int) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, count)


def tensor(*shape: int, kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a file to read, got: cannot mmap an empty file"),
        (header(magic=b"GGML"), "expected it to begin with GGUF, got b'GGML'"),
        (header(version=1), "version: expected 2 or 3, little-endian, got 1"),
        (header(version=3 << 24), "version: expected 2 or 3, little-endian, got 50331648"),
        (header(values=HUGE), "expected 8 more bytes at 24, got 0"),
        (header(tensors=HUGE), "expected 8 more bytes at 24, got 0"),
        (header(values=1) + struct.pack("<Q", HUGE), f"expected {HUGE} more bytes"),
        (header(values=1) + array(0, HUGE), "arrays of 4000000 values at most, got 4611686018427387904"),
        (header(values=1) + array(8, 3_000_000), "expected 8 more bytes"),
        (header(values=1) + array(9, 1) + struct.pack("<IQ", 9, 1), "arrays of arrays are not read"),
        (header(values=1) + text(b"a") + struct.pack("<I", 13), "a value of type 0 to 12, got 13"),
        (header(values=2) + (text(b"a") + struct.pack("<IB", 0, 1)) * 2, "expected each key once, got 'a' again"),
        (header(values=1) + text(b"\xff"), "expected names and strings in UTF-8"),
        (header(tensors=1) + text(b"t") + struct.pack("<I", 1 << 31), "1 to 4 dimensions, got 2147483648"),
        (header(tensors=1) + tensor(HUGE, HUGE), "t: expected its bytes before"),
        (header(tensors=1) + tensor(4, offset=HUGE), "t: expected its bytes before"),
        (header(tensors=1) + tensor(4, offset=7) + bytes(99), "from a multiple of 32"),
        (header(tensors=1) + tensor(4, kind=77), "expected a tensor of a known type, got 77"),
        (header(tensors=1) + tensor(33, kind=8), r"rows of a multiple of 32 values, got shape \[33\]"),
        (header(tensors=1) + tensor(0, 4), r"got shape \[4, 0\]"),
        (header(tensors=2) + tensor(4) * 2, "expected each name once, got 't' again"),
        (header(tensors=2) + tensor(4) + tensor(4, name=b"u") + bytes(200), "expected each in bytes of its own"),
        (
            header(values=1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
            "general.alignment: expected a power of two, got 0",
        ),
    ],
)
def test_a_broken_file_is_refused_and_said_how(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=rf"^GGUF file broken\.gguf: .*{message}"):
        read_gguf(path)


def test_a_file_cut_anywhere_is_refused(whole: Path, tmp_path: Path) -> None:
    content, path = whole.read_bytes(), tmp_path / "cut.gguf"
    for end in {*range(0, len(content), 997), len(content) - 1}:
        path.write_bytes(content[:end])
        with pytest.raises(BackboneError):
            read_gguf(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_changed_anywhere_give_a_backbone_or_an_error_of_ours(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Most changes are in the header, where they say how much there is of what, or what a tokenizer has."""
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, 16_000)))
        piece = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8), st.just(bytes(8))))
        content[at : at + len(piece)] = piece
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    try:
        assert load_backbone(str(path)).spec.family == "llama"
    except BackboneError as error:
        assert "expected" in error.message or "cannot" in error.message
