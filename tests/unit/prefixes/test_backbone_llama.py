"""Backbones of the Llama family: what is read, what is refused by name, and how every prompt begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import BackboneError
from prefixes.spec import SiteGeometry
from tests.support.llama import KINDS, save_tiny_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder, "llama")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """One whose tokenizer puts ``<s>`` before each text."""
    folder = tmp_path_factory.mktemp("beginning")
    save_tiny_llama(folder, begins=True)
    return load_backbone(str(folder))


def change(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", KINDS)
def test_key_heads_head_size_and_window_are_described(tmp_path: Path, kind: str) -> None:
    model = save_tiny_llama(tmp_path, kind)
    spec, config = load_backbone(str(tmp_path)).spec, model.config
    attention = model.model.layers[0].self_attn
    shape = attention.k_proj.weight.shape[0] // attention.head_dim, attention.head_dim
    assert spec.sites == {"decoder": SiteGeometry(config.num_hidden_layers, *shape)}
    assert (spec.family, spec.max_positions, spec.hidden_size) == ("llama", 320, 32)


def _rope(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, rope_parameters={"rope_theta": 1000.0, **values})


def _as_qwen2(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, model_type="qwen2", architectures=["Qwen2ForCausalLM"], **values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_rope(rope_type="dynamic", factor=2.0), "rope_type: expected default or linear or llama3 or yarn, got dyn"),
        (
            _rope(rope_type="longrope", factor=2.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
                  original_max_position_embeddings=80),
            "rope_type: expected .*, got longrope",
        ),
        (_rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor: expected 1, got 0.5"),
        (
            lambda folder: change(
                folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64, head_dim=None
            ),
            "sliding_window: expected none, got one of 64",
        ),
        (_as_qwen2(use_sliding_window=True, sliding_window=64, max_window_layers=0), "sliding_window: expected none"),
        (lambda folder: change(folder, hidden_act="swish7"), "hidden_act: expected silu or .*, got swish7"),
        (lambda folder: change(folder, model_type="gemma3_text"), "model family: expected gpt2 or bart or llama"),
    ],
)  # fmt: skip
def test_what_is_not_computed_exactly_is_refused_by_name(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


def test_a_window_that_qwen2_does_not_use_is_no_matter(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, "qwen2", use_sliding_window=False, sliding_window=64)
    assert load_backbone(str(tmp_path)).spec.max_positions == 320


def test_how_positions_are_scaled_is_part_of_the_identity(folder: Path) -> None:
    fingerprints = {load_backbone(str(folder)).spec.fingerprint}
    for values in (
        {"rope_theta": 2000.0, "rope_type": "default"},
        {"rope_theta": 1000.0, "rope_type": "linear", "factor": 2.0},
        {"rope_theta": 1000.0, "rope_type": "linear", "factor": 3.0},
    ):
        change(folder, rope_parameters=values)
        fingerprints.add(load_backbone(str(folder)).spec.fingerprint)
    assert len(fingerprints) == 4


def test_a_prompt_begins_as_the_models_own_tokenizer_begins_a_text(beginning: Backbone) -> None:
    texts = ("Blue Spice", "", "café ☕ <s>")
    tokenizer = AutoTokenizer.from_pretrained(beginning.model.name_or_path)
    for text in texts[:2]:
        assert beginning.prompt_encoder.encode("{input}", text) == tokenizer(text).input_ids
    first = tokenizer.bos_token_id
    for template in ("{input}", "name : {input} |", "<s>{input}", "<s> {input}<|endoftext|>"):
        for text in texts:
            ids = beginning.prompt_encoder.encode(template, text)
            assert ids[0] == first and first not in ids[1:], "once, whatever the template or the input says"
            fitted = beginning.prompt_encoder.fit(template, text, len(ids))
            assert fitted.token_ids == tuple(ids)
            assert beginning.prompt_encoder.fit(template, text, len(ids) - 1).token_ids is None
    assert beginning.prompt_encoder.refused("{input}", "x" * 9999, 5) is not None


def test_the_first_token_is_part_of_the_identity(beginning: Backbone, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beginning.model.name_or_path, tmp_path / "copy"))
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    state["post_processor"] = None
    path.write_text(json.dumps(state))
    without = load_backbone(str(folder))
    assert without.prompt_encoder.encode("{input}", "Blue") == beginning.prompt_encoder.encode("{input}", "Blue")[1:]
    assert without.spec.fingerprint != beginning.spec.fingerprint


def test_a_tokenizer_that_adds_tokens_behind_a_text_is_refused(beginning: Backbone, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(beginning.model.name_or_path, tmp_path / "copy"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 300), ("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(folder)
    with pytest.raises(BackboneError, match="expected one that adds tokens before a text and nowhere else"):
        load_backbone(str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_saved_model(tmp_path: Path, kind: str) -> None:
    model = save_tiny_llama(tmp_path, kind)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(load_backbone(str(tmp_path)).model(ids).logits, model(ids).logits)
