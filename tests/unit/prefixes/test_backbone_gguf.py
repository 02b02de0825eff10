"""Backbones in GGUF files: what is read, what is refused by name, and what their identity covers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, GgufConfig

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import BackboneError, IncompatiblePrefix
from prefixes.spec import SiteGeometry, check_compatible
from tests.support.gguf import KINDS, save_tiny_gguf, write
from tests.support.prefixes import make_prefix

F32, Q8_0, Q4_1 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1
IDS = torch.tensor([[5, 6, 7, 8, 200]])

Parts = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_tiny_gguf(path)
    return path


@pytest.fixture(scope="module")
def backbone(saved: Path) -> Backbone:
    return load_backbone(str(saved))


def changed(folder: Path, change: Callable[[Parts, Parts], None], **config: Any) -> Path:
    """The saved model's file with one change."""
    path = folder / "tiny.gguf"
    save_tiny_gguf(path, change=change, **config)
    return path


@pytest.mark.parametrize("architecture", KINDS)
def test_a_file_of_floats_computes_as_the_model_that_it_was_made_of(tmp_path: Path, architecture: str) -> None:
    model = save_tiny_gguf(tmp_path / "tiny.gguf", architecture)
    loaded = load_backbone(str(tmp_path / "tiny.gguf"))
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    twin = load_backbone(str(tmp_path / "twin"))
    assert (loaded.spec.family, loaded.spec.max_positions, loaded.spec.hidden_size) == ("llama", 320, 64)
    head = 128 if architecture == "qwen3" else 16
    assert loaded.spec.sites == twin.spec.sites == {"decoder": SiteGeometry(2, 2, head)}
    assert loaded.eos_token_ids == twin.eos_token_ids


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Q8_0, Q4_1])
def test_quantised_weights_are_those_that_transformers_makes_of_them(
    tmp_path: Path, kind: GGMLQuantizationType, tied: bool
) -> None:
    model = save_tiny_gguf(tmp_path / "tiny.gguf", kind=kind, tie_word_embeddings=tied)
    loaded = load_backbone(str(tmp_path / "tiny.gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    assert torch.equal(loaded.model(IDS).logits, theirs(IDS).logits)
    stored = gguf.dequantize(gguf.quantize(model.lm_head.weight.detach().numpy(), kind), kind)
    assert torch.equal(loaded.model.lm_head.weight, torch.from_numpy(stored))
    assert not torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("kind, few", [(F32, False), (GGMLQuantizationType.F16, False), (Q8_0, True), (Q4_1, True)])
def test_a_backbone_says_whether_its_file_has_8_bits_a_weight_or_fewer(
    tmp_path: Path, kind: GGMLQuantizationType, few: bool
) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    assert load_backbone(str(tmp_path / "tiny.gguf")).quantized is few
    assert not load_backbone(str(tmp_path / "twin")).quantized


def test_what_is_handed_on_is_a_plain_model(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", kind=Q8_0)
    half = load_backbone(str(tmp_path / "tiny.gguf"), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    double = half.to(torch.float64)
    double.save_pretrained(tmp_path / "again")
    again = type(double).from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    assert torch.equal(again(IDS).logits, double(IDS).logits)


def another_byte(metadata: Parts, tensors: Parts) -> None:
    weight = tensors["blk.1.ffn_up.weight"]
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))


@pytest.mark.parametrize(
    "change",
    [
        another_byte,
        lambda metadata, tensors: metadata.update({"general.name": "small"}),
        lambda metadata, tensors: metadata.update({"general.file_type": 0}),
        lambda metadata, tensors: metadata.update({"llama.context_length": 319}),
        lambda metadata, tensors: metadata["tokenizer.ggml.merges"].reverse(),
        lambda metadata, tensors: metadata["tokenizer.ggml.tokens"].__setitem__(303, "[UNUSED]"),
    ],
)
def test_the_identity_covers_every_byte_and_every_value(
    backbone: Backbone, tmp_path: Path, change: Callable[[Parts, Parts], None]
) -> None:
    assert load_backbone(str(changed(tmp_path, change))).spec.fingerprint != backbone.spec.fingerprint


def exchanged(metadata: Parts, tensors: Parts) -> None:
    first, second = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def test_the_identity_covers_the_tensors_names(backbone: Backbone, tmp_path: Path) -> None:
    other = load_backbone(str(changed(tmp_path, exchanged)))
    assert other.spec.fingerprint != backbone.spec.fingerprint


def test_the_identity_covers_the_tensors_types(backbone: Backbone, tmp_path: Path) -> None:
    fingerprints = {backbone.spec.fingerprint}
    for kind in (Q8_0, Q4_1, GGMLQuantizationType.F16):
        save_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
        fingerprints.add(load_backbone(str(tmp_path / "tiny.gguf")).spec.fingerprint)
    assert len(fingerprints) == 4


def test_the_identity_is_not_of_the_path_nor_of_the_order(backbone: Backbone, tmp_path: Path) -> None:
    def turned(metadata: Parts, tensors: Parts) -> None:
        for part in (metadata, tensors):
            items = list(part.items())
            part.clear()
            part.update(reversed(items))

    path = changed(tmp_path, turned).rename(tmp_path / "another name.gguf")
    assert load_backbone(str(path)).spec.fingerprint == backbone.spec.fingerprint


def test_a_safetensors_twin_is_another_backbone_and_the_error_says_so(saved: Path, backbone: Backbone) -> None:
    twin = load_backbone(str(saved.parent / "twin"))
    with pytest.raises(IncompatiblePrefix, match="a model's GGUF file and its safetensors are two backbones"):
        check_compatible(make_prefix(twin.spec).spec, backbone.spec)


def without(name: str) -> Callable[[Parts, Parts], None]:
    return lambda metadata, tensors: (metadata if name in metadata else tensors).pop(name)


def having(**values: Any) -> Callable[[Parts, Parts], None]:
    return lambda metadata, tensors: metadata.update({name.replace("__", "."): value for name, value in values.items()})


def with_tensor(name: str, shape: tuple[int, ...]) -> Callable[[Parts, Parts], None]:
    return lambda metadata, tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (having(llama__rope__scaling__type="linear"), "llama.rope.scaling.type: expected no such key"),
        (having(llama__expert_count=8), "llama.expert_count: expected no such key"),
        (having(llama__rope__dimension_count=8), "rope.dimension_count: expected 16, the size of a head, got 8"),
        (having(llama__attention__value_length=8), "value_length: expected 16, the size of a head, got 8"),
        (having(llama__attention__head_count=0), "head_count: expected at least 1, got 0"),
        (having(llama__attention__head_count="4"), "head_count: expected a value of type int, got '4'"),
        (having(llama__attention__head_count_kv=4), r"blk.0.attn_k.weight: expected a shape of \[64, 64\], got \[32"),
        (having(llama__embedding_length=1 << 20), r"token_embd.weight: expected a shape of \[304, 1048576\]"),
        (having(llama__block_count=3), "blk.2.attn_norm.weight: expected in the file, found none"),
        (having(llama__block_count=1 << 30), "block_count: expected 1 to 1000, got 1073741824"),
        (having(llama__vocab_size=999), r"token_embd.weight: expected a shape of \[999, 64\], got \[304, 64\]"),
        (having(tokenizer__ggml__model="llama"), "tokenizer.ggml.model: expected gpt2, a byte-level one, got llama"),
        (having(tokenizer__ggml__pre="dbrx"), "pre: expected gpt-2 or llama-bpe or qwen2 or smollm, got dbrx"),
        (having(tokenizer__ggml__eos_token_id=9999), "cannot load its tokenizer"),
        (without("llama.context_length"), "context_length: expected a value of type int, got none"),
        (without("tokenizer.ggml.pre"), "tokenizer.ggml.pre: expected gpt-2 or .*, got none"),
        (without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens|cannot"),
        (without("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight: expected in the file, found none"),
        (with_tensor("rope_freqs.weight", (8,)), "tensor rope_freqs.weight: expected none of this name in llama"),
        (with_tensor("blk.0.attn_q.bias", (64,)), "tensor blk.0.attn_q.bias: expected none of this name in llama"),
    ],
)
def test_what_is_not_computed_exactly_is_refused_by_name(
    tmp_path: Path, change: Callable[[Parts, Parts], None], message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(changed(tmp_path, change)))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "other.gguf", {"general.architecture": "gpt2"}, {}, F32)
    with pytest.raises(BackboneError, match=r"general\.architecture: expected llama or qwen2 or qwen3, got gpt2"):
        load_backbone(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize("name", ["nowhere.gguf", "/nowhere/at/all.gguf", "somebody/model.gguf"])
def test_a_file_that_is_not_there_is_never_looked_up_elsewhere(name: str) -> None:
    with pytest.raises(BackboneError, match=r"expected a folder or FOLDER/NAME\.gguf, found none"):
        load_backbone(name)


def test_without_the_extra_the_error_says_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixes.gguf_checkpoint.is_gguf_available", lambda: False)
    with pytest.raises(BackboneError, match=r"expected gguf, accelerate .*: pip install 'prefixd\[gguf\]'"):
        load_backbone(str(saved))


def test_what_lies_beside_the_file_is_not_its_tokenizer(backbone: Backbone, saved: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        content = (saved.parent / "twin" / name).read_text()
        (tmp_path / name).write_text(content.replace('"Ġ"', '"Q"'))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(saved.read_bytes())
    loaded = load_backbone(str(path))
    assert loaded.tokenizer("a b").input_ids == backbone.tokenizer("a b").input_ids
    assert loaded.spec == backbone.spec


def test_a_generation_config_beside_the_file_holds(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(saved.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7], "repetition_penalty": 1.5}))
    loaded = load_backbone(str(path))
    assert loaded.eos_token_ids == (0, 7)
    assert loaded.generation_defaults == {"repetition_penalty": 1.5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"guidance_scale": 2.0}))
    with pytest.raises(BackboneError, match="guidance_scale"):
        load_backbone(str(path))


@pytest.mark.parametrize("begins", [False, True])
def test_a_prompt_begins_as_the_file_says(tmp_path: Path, begins: bool) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", begins=begins)
    loaded, twin = (load_backbone(str(tmp_path / name)) for name in ("tiny.gguf", "twin"))
    for text in ("Blue Spice", "", "café ☕"):
        ids = loaded.prompt_encoder.encode("{input}", text)
        assert ids == twin.prompt_encoder.encode("{input}", text)
        assert (ids[:1] == [300]) is begins


def split_as(folder: Path, pre: str) -> Any:
    path = changed(folder, having(tokenizer__ggml__pre=pre))
    return load_backbone(str(path)).tokenizer.backend_tokenizer


def test_a_smollm_tokenizer_cuts_digits_from_the_spaces_before_them(tmp_path: Path) -> None:
    """Its own does; transformers reads the file's as GPT-2's, which gives the last space to the digit."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [piece for piece, _ in byte_level.pre_tokenize_str("a  12")] == ["a", "Ġ", "Ġ12"]
    cut = split_as(tmp_path, "smollm").pre_tokenizer
    assert [piece for piece, _ in cut.pre_tokenize_str("a  12")] == ["a", "ĠĠ", "1", "2"]


def test_a_llama_tokenizer_takes_whole_words_before_it_merges(tmp_path: Path) -> None:
    def unmerged(metadata: Parts, tensors: Parts) -> None:
        metadata["tokenizer.ggml.pre"] = "llama-bpe"
        metadata["tokenizer.ggml.tokens"][303] = "qzq"

    backend = load_backbone(str(changed(tmp_path, unmerged))).tokenizer.backend_tokenizer
    assert backend.encode("qzq").ids == [303]


def test_a_qwen_tokenizer_composes_characters(tmp_path: Path) -> None:
    assert isinstance(split_as(tmp_path, "qwen2").normalizer, normalizers.NFC)


def test_reading_a_file_writes_nothing_where_no_progress_is_shown(
    saved: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixes.gguf_checkpoint.is_progress_bar_enabled", lambda: False)
    before = sys.stderr
    load_backbone(str(saved))
    assert "de-quantizing" not in capfd.readouterr().err and sys.stderr is before
