"""Checkpoint files of the paper's code: tensors come out, and no code that stands in a file ever runs."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.errors import InvalidArtifact
from prefixes.formats.paper_file import read_checkpoint
from tests.support.paper import Payload

TENSORS = {"wte.weight": torch.arange(6.0).view(2, 3), "control_trans": torch.ones(4)}


def state_dict() -> Any:
    """With the attribute that a module's own has, which is pickled with it."""
    state: Any = OrderedDict(TENSORS)
    state._metadata = OrderedDict({"": {"version": 1}})
    return state


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_comes_out_as_it_went_in(zipped: bool, tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "x.bin")
    assert read.config == {}
    assert read.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(read.tensors[name], TENSORS[name]) for name in TENSORS)


def test_a_folder_brings_its_configuration(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path).config == {}
    (tmp_path / "config.json").write_text('{"preseqlen": 5}')
    assert read_checkpoint(tmp_path).config == {"preseqlen": 5}
    assert read_checkpoint(tmp_path / "pytorch_model.bin").config == {"preseqlen": 5}


@pytest.mark.parametrize("hyper", [{"preseqlen": 7}, argparse.Namespace(preseqlen=7), None, 3])
def test_lightning_keeps_the_prefix_model_among_others(hyper: Any, tmp_path: Path) -> None:
    state = {**{f"model.{name}": tensor for name, tensor in TENSORS.items()}, "seq2seq_model.x": torch.zeros(1)}
    torch.save({"state_dict": state, "hyper_parameters": hyper, "optimizer_states": [{"lr": 1}]}, tmp_path / "x.ckpt")
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert read.tensors.keys() == TENSORS.keys()
    assert read.config == ({"preseqlen": 7} if hyper not in (None, 3) else {})


def with_payload(place: str, marker: Path) -> Any:
    payload = Payload(marker)
    return {
        "whole file": payload,
        "beside tensors": {**TENSORS, "extra": payload},
        "instead of a tensor": {"wte.weight": payload},
        "hyperparameters": {"state_dict": TENSORS, "hyper_parameters": {"preseqlen": payload}},
        "in a Namespace": {"state_dict": TENSORS, "hyper_parameters": argparse.Namespace(preseqlen=payload)},
    }[place]


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize(
    "place", ["whole file", "beside tensors", "instead of a tensor", "hyperparameters", "in a Namespace"]
)
def test_pickled_code_is_refused_and_not_run(place: str, form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    evil = with_payload(place, marker)
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InvalidArtifact) as caught:
        read_checkpoint(tmp_path)
    assert not marker.exists()
    if form != "plain pickle":
        assert "its pickled code was not run" in caught.value.message
        torch.load(path, weights_only=False)  # the payload is a live one: read carelessly, it does run
        assert marker.exists()


def test_a_class_that_the_file_needs_is_named_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "hyper_parameters": {"output_dir": Path("x")}}, tmp_path / "x.ckpt")
    with pytest.raises(
        InvalidArtifact, match=r"needs pathlib\.PosixPath.*save the prefix model's state_dict\(\) alone"
    ):
        read_checkpoint(tmp_path / "x.ckpt")


def test_allowing_namespaces_ends_with_the_reading(tmp_path: Path) -> None:
    torch.save(argparse.Namespace(a=1), tmp_path / "x.bin")
    with pytest.raises(InvalidArtifact, match="expected tensors by name, got Namespace"):
        read_checkpoint(tmp_path / "x.bin")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.bin", weights_only=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected tensors by name, got none"),
        ([1, 2], "expected tensors by name, got list"),
        ({"wte.weight": 3}, "'wte.weight': expected a tensor, got int"),
        ({"state_dict": {}}, "expected tensors by name, got none"),
        ({"wte.weight": torch.ones(2).int()}, "expected dense floating point, got torch.strided torch.int32"),
        ({"wte.weight": torch.ones(2).to_sparse()}, "expected dense floating point, got torch.sparse_coo"),
        ({"wte.weight": torch.ones(2, dtype=torch.complex64)}, "expected dense floating point"),
        ({"wte.weight": torch.tensor([1.0, float("nan")])}, "'wte.weight': expected finite values"),
        ({"wte.weight": torch.tensor([1.0, float("inf")])}, "'wte.weight': expected finite values"),
    ],
)
def test_other_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(InvalidArtifact, match=message):
        read_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02.", b"not a checkpoint", b"{}"])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(InvalidArtifact, match=r"x\.bin: expected"):
        read_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused_wherever_it_ends(zipped: bool, tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "x.bin").read_bytes()
    for length in range(0, len(data) - 1, 37):
        (tmp_path / "x.bin").write_bytes(data[:length])
        with pytest.raises(InvalidArtifact):
            read_checkpoint(tmp_path / "x.bin")


def test_places_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InvalidArtifact, match=r"expected a folder with pytorch_model\.bin, .*found \['notes\.txt'\]"):
        read_checkpoint(tmp_path)
    with pytest.raises(InvalidArtifact, match="found none"):
        read_checkpoint(tmp_path / "nowhere")
    torch.save(state_dict(), tmp_path / "pytorch_model.bin")
    for text, message in [("{", "expected JSON"), ("[]", "expected an object, got list")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InvalidArtifact, match=message):
            read_checkpoint(tmp_path)
