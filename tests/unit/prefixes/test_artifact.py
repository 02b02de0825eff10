"""The artifact: exact round trip, a digest over content alone, and nothing but InvalidArtifact for any bad bytes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from prefixes.artifact import MAX_HEADER_BYTES, Prefix, read_prefix, read_spec, version_of, write_prefix
from prefixes.errors import InvalidArtifact
from prefixes.spec import SITES, Positions, PrefixSpec, Site, SiteGeometry, SitePrefix
from prefixes.spec_json import spec_from_dict, spec_to_dict
from tests.support.prefixes import FINGERPRINT, make_prefix

DEFAULTS = {"num_beams": 5, "temperature": 0.7, "stop": ["\n"], "early_stopping": "never", "do_sample": False}
ORIGIN = {"method": "mlp", "data": "sha256:00", "hyper": {"lr": 8e-5, "epochs": 5, "words": ["é", "名"], "x": None}}


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assemble(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def same(left: Prefix, right: Prefix) -> bool:
    return left.spec == right.spec and all(
        torch.equal(left.tensors[name].view(torch.uint8), right.tensors[name].view(torch.uint8))
        for name in left.tensors.keys() | right.tensors.keys()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_is_exact_in_every_dtype(dtype: torch.dtype) -> None:
    prefix = make_prefix(dtype=dtype, sites=("decoder", "encoder", "cross"), defaults=DEFAULTS, origin=ORIGIN)
    data = write_prefix(prefix)
    assert same(read_prefix(data, expected_version=version_of(prefix)), prefix)
    assert read_spec(data) == prefix.spec


SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(SITES, size)]


def three_sites(sites: tuple[Site, ...], shifted: tuple[Site, ...]) -> Prefix:
    """Every site with a length, a geometry and a dtype of its own."""
    geometry = {"decoder": SiteGeometry(2, 2, 4), "encoder": SiteGeometry(3, 4, 2), "cross": SiteGeometry(2, 2, 4)}
    lengths, dtypes = (
        {"decoder": 1, "encoder": 4, "cross": 7},
        {"decoder": "float32", "encoder": "bfloat16", "cross": "float16"},
    )
    sited, tensors = {}, {}
    for seed, site in enumerate(sites):
        positions: Positions = "shifted" if site in shifted else "unshifted"
        sited[site] = SitePrefix(lengths[site], positions, geometry[site], dtypes[site])
        shape = (geometry[site].layers, lengths[site], geometry[site].kv_heads, geometry[site].head_dim)
        generator = torch.Generator().manual_seed(seed)
        for part in ("key", "value"):
            tensors[f"{site}.{part}"] = torch.randn(shape, generator=generator).to(getattr(torch, dtypes[site]))
    return Prefix(PrefixSpec(FINGERPRINT, sited), tensors)


@pytest.mark.parametrize("shifted", [(), ("decoder",), ("encoder",), ("decoder", "encoder")])
@pytest.mark.parametrize("sites", SUBSETS)
def test_any_subset_of_sites_comes_back_with_its_own_geometry_and_positions(
    sites: tuple[Site, ...], shifted: tuple[Site, ...]
) -> None:
    prefix = three_sites(sites, shifted)
    read = read_prefix(write_prefix(prefix), expected_version=version_of(prefix))
    assert same(read, prefix)
    assert read.tensors.keys() == {f"{site}.{part}" for site in sites for part in ("key", "value")}
    for site in SITES:
        assert read.spec.length(site) == prefix.spec.length(site)
        counted = site in shifted and site in sites
        assert read.spec.position_offset(site) == (prefix.spec.length(site) if counted else 0)


def test_how_positions_count_is_part_of_the_version() -> None:
    sites: tuple[Site, ...] = ("decoder", "encoder")
    ways: list[tuple[Site, ...]] = [(), ("decoder",), ("encoder",), sites]
    assert len({version_of(three_sites(sites, shifted)) for shifted in ways}) == len(ways)


def test_a_site_without_its_tensors_and_tensors_without_their_site_are_refused() -> None:
    prefix = three_sites(SITES, ())
    some = {name: tensor for name, tensor in prefix.tensors.items() if name != "cross.value"}
    with pytest.raises(InvalidArtifact, match=r"tensors: expected .*cross\.value.*; got cross\.key, decoder\.key"):
        write_prefix(Prefix(prefix.spec, some))
    fewer = replace(prefix.spec, sites={site: prefix.spec.sites[site] for site in ("decoder", "cross")})
    with pytest.raises(InvalidArtifact, match=r"expected cross\.key, .*; got .*encoder\.key"):
        write_prefix(Prefix(fewer, prefix.tensors))


def test_tensors_of_another_sites_geometry_are_refused() -> None:
    prefix = three_sites(SITES, ())
    tensors = {**prefix.tensors, "encoder.key": prefix.tensors["decoder.key"].bfloat16()}
    with pytest.raises(InvalidArtifact, match=r"'encoder.key': expected bfloat16 \(3, 4, 4, 2\), got .*\(2, 1, 2, 4\)"):
        write_prefix(Prefix(prefix.spec, tensors))


def test_a_shifted_prefix_at_cross_attention_is_refused_in_memory_as_in_a_file() -> None:
    """Nothing counts positions there: a reader that took `shifted` for meaning something would shift the wrong site."""
    prefix = three_sites(("cross",), ("cross",))
    with pytest.raises(InvalidArtifact, match="site 'cross': positions: expected unshifted, got 'shifted'"):
        write_prefix(prefix)
    raw = spec_to_dict(three_sites(("cross",), ()).spec)
    raw["sites"]["cross"]["positions"] = "shifted"
    with pytest.raises(InvalidArtifact, match="expected unshifted, got 'shifted'"):
        spec_from_dict(raw)


def test_the_file_is_plain_safetensors_with_the_tensors_named_by_site() -> None:
    prefix = make_prefix(length=5)
    tensors = load(write_prefix(prefix))
    assert sorted(tensors) == ["decoder.key", "decoder.value"]
    assert torch.equal(tensors["decoder.key"], prefix.tensors["decoder.key"])
    assert tensors["decoder.key"].shape == (2, 5, 2, 4)


def test_bytes_and_digest_depend_on_content_not_on_order() -> None:
    prefix = make_prefix(sites=("decoder", "cross"), defaults=DEFAULTS, origin=ORIGIN)
    spec = replace(
        prefix.spec,
        sites=dict(sorted(prefix.spec.sites.items())),
        defaults=dict(reversed(DEFAULTS.items())),
        origin=dict(reversed(ORIGIN.items())),
    )
    other = Prefix(spec, dict(sorted(prefix.tensors.items(), reverse=True)))
    assert write_prefix(other) == write_prefix(prefix)
    assert version_of(other) == version_of(prefix)


def test_digest_of_a_non_contiguous_tensor_is_that_of_its_content() -> None:
    prefix = make_prefix()
    tensors = {name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in prefix.tensors.items()}
    assert not tensors["decoder.key"].is_contiguous()
    assert version_of(Prefix(prefix.spec, tensors)) == version_of(prefix)


def test_digest_survives_another_writer_with_another_header_order() -> None:
    prefix = make_prefix()
    header, _ = parts_of(write_prefix(prefix))
    data = save(dict(prefix.tensors), metadata=header["__metadata__"])
    assert version_of(read_prefix(data)) == version_of(prefix)


def changed_values(prefix: Prefix) -> Prefix:
    key = prefix.tensors["decoder.key"].clone()
    key[0, 0, 0, 0] = torch.nextafter(key[0, 0, 0, 0], torch.tensor(9.0))
    return Prefix(prefix.spec, {**prefix.tensors, "decoder.key": key})


@pytest.mark.parametrize(
    "change",
    [
        changed_values,
        lambda p: Prefix(replace(p.spec, template="a {input}"), p.tensors),
        lambda p: Prefix(replace(p.spec, origin={"method": "kv"}), p.tensors),
        lambda p: Prefix(replace(p.spec, defaults={"seed": 1}), p.tensors),
        lambda p: Prefix(replace(p.spec, fingerprint="sha256:" + "0" * 64), p.tensors),
        lambda p: Prefix(
            p.spec, {"decoder.key": p.tensors["decoder.value"], "decoder.value": p.tensors["decoder.key"]}
        ),
    ],
)
def test_any_change_of_content_changes_the_version(change: Callable[[Prefix], Prefix]) -> None:
    prefix = make_prefix()
    other = change(prefix)
    assert version_of(other) != version_of(prefix)
    with pytest.raises(InvalidArtifact, match="digest: expected sha256"):
        read_prefix(write_prefix(other), expected_version=version_of(prefix))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    before=st.text(max_size=8).filter(lambda text: "{" not in text),
    origin=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    ),
)
def test_whatever_is_written_reads_back_equal(
    seed: int, length: int, dtype: torch.dtype, before: str, origin: dict[str, Any]
) -> None:
    prefix = make_prefix(length=length, seed=seed, dtype=dtype, template=before + "{input}", origin=origin)
    data = write_prefix(prefix)
    assert same(read_prefix(data, expected_version=version_of(prefix)), prefix)
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(prefix.spec)))) == prefix.spec


PREFIX = make_prefix(defaults=DEFAULTS, origin=ORIGIN)
DATA = write_prefix(PREFIX)
VERSION = version_of(PREFIX)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DATA) - 1))
def test_every_truncation_is_an_invalid_artifact(length: int) -> None:
    with pytest.raises(InvalidArtifact):
        read_prefix(DATA[:length])


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.integers(0, len(DATA) * 8 - 1), min_size=1, max_size=3, unique=True))
def test_flipped_bits_are_an_invalid_artifact_or_the_same_content(bits: list[int]) -> None:
    broken = bytearray(DATA)
    for bit in bits:
        broken[bit // 8] ^= 1 << bit % 8
    with suppress(InvalidArtifact):
        assert same(read_prefix(bytes(broken), expected_version=VERSION), PREFIX)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes_are_an_invalid_artifact(noise: bytes, claimed: int) -> None:
    for data in (noise, struct.pack("<Q", claimed) + noise):
        with pytest.raises(InvalidArtifact):
            read_prefix(data)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*spec_to_dict(PREFIX.spec), "decoder", "length", "x"]), inner, max_size=6
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_spec_or_an_invalid_artifact(value: Any) -> None:
    metadata = {**spec_to_dict(PREFIX.spec), **(value if isinstance(value, dict) else {"sites": value})}
    for candidate in (value, metadata):
        with suppress(InvalidArtifact):
            spec_to_dict(spec_from_dict(candidate))


def test_a_digest_is_reproduced_by_another_process_tomorrow() -> None:
    """Pinned: a change of the canonical form would orphan every published version."""
    prefix = make_prefix(length=1)
    tensors = {name: torch.full_like(tensor, 0.5) for name, tensor in prefix.tensors.items()}
    spec = PrefixSpec(prefix.spec.fingerprint, prefix.spec.sites, origin={"a": 1})
    assert version_of(Prefix(spec, tensors)) == PINNED


PINNED = "sha256:87db2531ed257a36a22b9d922a4ad2ca7089d0f33394225bc490b52c680e2d91"


def with_metadata(**changes: Any) -> bytes:
    header, body = parts_of(DATA)
    metadata = json.loads(header["__metadata__"]["prefixd"])
    metadata.update(changes)
    header["__metadata__"]["prefixd"] = json.dumps(metadata)
    return assemble(header, body)


def with_metadata_text(old: str, new: str) -> bytes:
    def change(header: dict[str, Any]) -> None:
        assert old in header["__metadata__"]["prefixd"]
        header["__metadata__"]["prefixd"] = header["__metadata__"]["prefixd"].replace(old, new)

    return with_header(change)


def with_site(**changes: Any) -> bytes:
    return with_metadata(sites={"decoder": {**spec_to_dict(PREFIX.spec)["sites"]["decoder"], **changes}})


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    header, body = parts_of(DATA)
    change(header)
    return assemble(header, body)


def with_tensor(tensor: torch.Tensor, name: str = "decoder.key") -> bytes:
    header, _ = parts_of(DATA)
    return bytes(save({**PREFIX.tensors, name: tensor}, metadata=header["__metadata__"]))


def swapped_offsets(header: dict[str, Any]) -> None:
    header["decoder.key"]["data_offsets"] = header["decoder.value"]["data_offsets"]


def far_offsets(header: dict[str, Any]) -> None:
    header["decoder.value"]["data_offsets"][1] = 1 << 62


nan = PREFIX.tensors["decoder.key"].clone()
nan[1, 2, 1, 3] = float("nan")

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "at least 8 bytes, got 0"),
    "foreign": (save({"prompt_embeddings": torch.zeros(2, 3)}), "exactly the metadata 'prefixd', got none"),
    "foreign metadata": (save({"x": torch.zeros(1)}, metadata={"format": "pt"}), r"got \['format'\]"),
    "more metadata": (with_header(lambda h: h["__metadata__"].update(note="x")), "exactly the metadata"),
    "metadata no JSON": (with_header(lambda h: h["__metadata__"].update(prefixd="{")), "prefix metadata: expected"),
    "huge header": (struct.pack("<Q", 1 << 62) + b"{}", "header length: expected 2 to 2 bytes"),
    "big header": (assemble(b" " * (MAX_HEADER_BYTES + 1), b""), f"2 to {MAX_HEADER_BYTES} bytes"),
    "header no JSON": (assemble(b"[1, ", b""), "safetensors header: expected JSON"),
    "header a list": (assemble([], b""), "got none"),
    "deep header": (assemble(b"[" * 100_000, b""), "safetensors header: expected JSON"),
    "header key twice": (assemble(b'{"a":1,"a":2}', b""), "a key twice"),
    "NaN in metadata": (with_metadata(defaults={"temperature": float("nan")}), "which is not JSON"),
    "infinite number": (with_metadata_text("0.7", "9e999"), "temperature: expected a finite number, got inf"),
    "missing key": (assemble({"__metadata__": {"prefixd": '{"format_version":1}'}}, b""), "missing .*fingerprint"),
    "unknown key": (with_metadata(colour="blue"), "unknown .*colour"),
    "other format version": (with_metadata(format_version=2), "format version: expected 1, got 2"),
    "format version true": (with_metadata(format_version=True), "format version: expected 1, got True"),
    "metadata a list": (with_header(lambda h: h["__metadata__"].update(prefixd="[]")), "format version"),
    "overlapping offsets": (with_header(swapped_offsets), "whole safetensors file"),
    "offsets out of range": (with_header(far_offsets), "whole safetensors file"),
    "trailing bytes": (DATA + b"\0", "whole safetensors file"),
    "wrong dtype": (with_tensor(PREFIX.tensors["decoder.key"].half()), "expected float32 .* got float16"),
    "integer dtype": (with_tensor(torch.zeros(2, 3, 2, 4, dtype=torch.int32)), "expected dtype .* got I32"),
    "unknown dtype name": (with_header(lambda h: h["decoder.key"].update(dtype="F7")), "whole safetensors file"),
    "wrong shape": (with_tensor(torch.zeros(2, 3, 4, 2)), r"\(2, 3, 2, 4\), got float32 \(2, 3, 4, 2\)"),
    "key and value differ": (with_tensor(torch.zeros(2, 4, 2, 4), "decoder.value"), r"'decoder.value'.*\(2, 4, 2, 4\)"),
    "another tensor": (with_tensor(torch.zeros(1), "cross.key"), "tensors: expected decoder.key, decoder.value; got"),
    "NaN value": (with_tensor(nan), "'decoder.key': expected finite values, got 1 of 48"),
    "infinite value": (with_tensor(nan.nan_to_num(0) / 0), "expected finite values, got 48 of 48"),
    "length 0": (with_site(length=0), "length: expected an integer from 1"),
    "length 1e9": (with_site(length=10**9), "length: expected an integer from 1"),
    "length true": (with_site(length=True), "length: expected an integer from 1"),
    "other length": (with_site(length=4), r"expected float32 \(2, 4, 2, 4\), got float32 \(2, 3, 2, 4\)"),
    "positions": (with_site(positions="rotary"), "positions: expected shifted or unshifted, got 'rotary'"),
    "positions a list": (with_site(positions=[]), "positions: expected"),
    "dtype": (with_site(dtype="int8"), "dtype: expected float32 or"),
    "site field": (with_site(window=1), "unknown .*window"),
    "site name": (with_metadata(sites={"middle": spec_to_dict(PREFIX.spec)["sites"]["decoder"]}), "got 'middle'"),
    "no sites": (with_metadata(sites={}), "at least one"),
    "fingerprint": (with_metadata(fingerprint="md5:1"), "fingerprint: expected sha256"),
    "fingerprint a number": (with_metadata(fingerprint=1), "fingerprint: expected sha256"),
    "template without slot": (with_metadata(template="summarise:"), "exactly one {input}, got 0"),
    "template with two": (with_metadata(template="{input}{input}"), "exactly one {input}, got 2"),
    "template surrogate": (with_metadata(template="\ud800{input}"), "lone surrogate"),
    "unknown default": (with_metadata(defaults={"max_tokens": 4}), "expected one of max_new_tokens"),
    "default of wrong type": (with_metadata(defaults={"do_sample": 1}), "do_sample: expected boolean, got int"),
    "default a bool": (with_metadata(defaults={"top_k": True}), "top_k: expected integer, got bool"),
    "stop a string": (with_metadata(defaults={"stop": "x"}), "stop: expected list of strings, got str"),
    "origin a list": (with_metadata(origin=[]), "origin: expected an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bytes_are_refused_with_expected_and_got(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(InvalidArtifact, match=message):
        read_prefix(data)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (Prefix(PREFIX.spec, {}), "tensors: expected decoder.key, decoder.value; got none"),
        (Prefix(PREFIX.spec, {**PREFIX.tensors, "decoder.key": nan}), "finite"),
        (Prefix(replace(PREFIX.spec, template="no slot"), PREFIX.tensors), "exactly one"),
        (Prefix(replace(PREFIX.spec, origin={"loss": float("nan")}), PREFIX.tensors), "origin.loss: expected a finite"),
        (Prefix(replace(PREFIX.spec, origin={"when": object()}), PREFIX.tensors), "origin.when: expected a JSON value"),
        (Prefix(replace(PREFIX.spec, origin={"pad": "x" * MAX_HEADER_BYTES}), PREFIX.tensors), "header: expected"),
    ],
)
def test_writing_refuses_what_reading_would(prefix: Prefix, message: str) -> None:
    with pytest.raises(InvalidArtifact, match=message):
        write_prefix(prefix)


def test_reading_leaves_the_bytes_alone() -> None:
    """A prefix that shared memory with the upload's buffer would change under a later write to either."""
    prefix = read_prefix(DATA)
    before = bytes(DATA)
    prefix.tensors["decoder.key"].fill_(random.random())
    assert before == DATA
