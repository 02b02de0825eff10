"""The loader on BART folders: its three sites, its ways of beginning and ending an output, and one identity for every
form in which one checkpoint is saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import BackboneError
from tests.support.bart import save_tiny_bart, save_tiny_bart_tokenizer
from tests.support.paths import SHARED
from tests.support.prompt import encode_prompt

PUBLISHED_TOKENIZER = SHARED / "tokenizers" / "bart"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("backbone")
    save_tiny_bart(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(saved: Path) -> Backbone:
    return load_backbone(str(saved))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(saved, tmp_path / "copy")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file({name: t.clone() for name, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def fingerprint(folder: Path) -> str:
    return load_backbone(str(folder)).spec.fingerprint


def test_the_three_sites_and_the_window_are_described(backbone: Backbone) -> None:
    spec = backbone.spec
    assert (spec.family, spec.hidden_size, spec.vocab_size, spec.max_positions) == ("bart", 32, 320, 64)
    assert {site: tuple(geometry.as_dict().values()) for site, geometry in spec.sites.items()} == {
        "decoder": (3, 4, 8),
        "encoder": (2, 4, 8),
        "cross": (3, 4, 8),
    }
    assert (spec.input_site, spec.input_room(None)) == ("encoder", 64)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_outputs_begin_behind_the_start_token_and_inputs_stand_between_special_tokens(backbone: Backbone) -> None:
    assert (backbone.decoder_prompt, backbone.forced_first, backbone.forced_last) == ((2,), None, 2)
    assert backbone.eos_token_ids == (2,)
    assert backbone.input_template == "<s>{input}</s>"
    text = "Blue Spice </s> café"
    assert encode_prompt(backbone.tokenizer, backbone.input_template, "Blue Spice") == (
        backbone.tokenizer("Blue Spice").input_ids
    )
    inner = encode_prompt(backbone.tokenizer, backbone.input_template, text)[1:-1]
    assert not {0, 1, 2} & set(inner), "a user's text has no special tokens"
    assert backbone.tokenizer.decode(inner) == text


def test_generation_defaults_are_the_folders_without_the_start_token(folder: Path) -> None:
    """As `bart-large-cnn` has them."""
    summary = {"num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "early_stopping": True}
    settings = {"forced_bos_token_id": 0, "decoder_start_token_id": 5, "max_length": 142, "min_length": 56, **summary}
    edit_json(folder / "generation_config.json", **settings)
    backbone = load_backbone(str(folder))
    assert backbone.generation_defaults == {"max_new_tokens": 141, "min_new_tokens": 55, **summary}
    assert (backbone.decoder_prompt, backbone.forced_first, backbone.forced_last) == ((5,), 0, 2)


def test_lengths_in_new_tokens_stand_over_whole_lengths(folder: Path) -> None:
    edit_json(folder / "generation_config.json", max_length=142, max_new_tokens=7, min_length=0)
    assert load_backbone(str(folder)).generation_defaults == {"max_new_tokens": 7}


def test_a_folder_without_a_generation_config_has_the_models(folder: Path, backbone: Backbone) -> None:
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", decoder_start_token_id=0, forced_eos_token_id=None)
    again = load_backbone(str(folder))
    assert (again.decoder_prompt, again.forced_last, again.eos_token_ids) == ((0,), None, (2,))
    assert again.spec == backbone.spec, "how a text begins and ends is no part of the weights' identity"


def test_a_configuration_of_old_that_says_how_to_generate_is_read(folder: Path) -> None:
    """`bart-large-cnn` before generation configs, with settings that no longer mean anything."""
    (folder / "generation_config.json").unlink()
    summary = {"num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "early_stopping": True}
    lengths = {"max_length": 142, "min_length": 56, "forced_bos_token_id": 0}
    stale = {"extra_pos_embeddings": 2, "normalize_before": False, "prefix": " ", "output_past": True}
    edit_json(folder / "config.json", **summary, **lengths, **stale, task_specific_params={"summarization": summary})
    backbone = load_backbone(str(folder))
    assert backbone.generation_defaults == {"max_new_tokens": 141, "min_new_tokens": 55, **summary}
    assert (backbone.forced_first, backbone.forced_last) == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_fingerprint_is_taken_before_the_cast(saved: Path, backbone: Backbone, dtype: torch.dtype) -> None:
    cast = load_backbone(str(saved), dtype=dtype)
    assert {parameter.dtype for parameter in cast.model.parameters()} == {dtype}
    assert cast.spec == backbone.spec


def test_saving_again_keeps_the_identity(backbone: Backbone, tmp_path: Path) -> None:
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == backbone.spec.fingerprint


def test_the_base_models_checkpoint_is_the_same_backbone(backbone: Backbone, tmp_path: Path) -> None:
    save_tiny_bart_tokenizer(tmp_path)
    backbone.model.model.save_pretrained(tmp_path)
    assert "shared.weight" in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BartModel"]
    again = load_backbone(str(tmp_path))
    assert again.spec == backbone.spec
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.model(ids).logits, backbone.model(ids).logits)


def base_names(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def as_the_hub_has_it(tensors: Tensors) -> Tensors:
    """`facebook/bart-base`: the base model's names, the shared embedding once per place, no bias of the head."""
    named = base_names({name: tensor for name, tensor in tensors.items() if name != "final_logits_bias"})
    return named | {f"{part}.embed_tokens.weight": named["shared.weight"] for part in ("encoder", "decoder")}


def with_every_copy(tensors: Tensors) -> Tensors:
    shared = tensors["model.shared.weight"]
    copies = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    return tensors | dict.fromkeys(copies, shared)


def with_only_the_head(tensors: Tensors) -> Tensors:
    return {"lm_head.weight" if "shared" in name else name: tensor for name, tensor in tensors.items()}


def without_the_bias(tensors: Tensors) -> Tensors:
    assert not tensors["final_logits_bias"].any()
    return {name: tensor for name, tensor in tensors.items() if name != "final_logits_bias"}


@pytest.mark.parametrize(
    "form", [base_names, as_the_hub_has_it, with_every_copy, with_only_the_head, without_the_bias]
)
def test_one_identity_for_every_form_of_one_checkpoint(
    folder: Path, backbone: Backbone, form: Callable[[Tensors], Tensors]
) -> None:
    rewrite(folder, form)
    again = load_backbone(str(folder))
    assert again.spec.fingerprint == backbone.spec.fingerprint
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.model(ids).logits, backbone.model(ids).logits)


def one_ulp(folder: Path, name: str) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[5] = torch.nextafter(tensors[name].view(-1)[5], torch.tensor(9.0))
        return tensors

    rewrite(folder, change)


def an_untied_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.shared.weight"] + 1})


def an_untied_encoder(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"model.encoder.embed_tokens.weight": tensors["model.shared.weight"] + 1})


def another_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(folder)


CHANGES: dict[str, Callable[[Path], None]] = {
    "encoder": lambda folder: one_ulp(folder, "model.encoder.layers.1.fc1.weight"),
    "cross": lambda folder: one_ulp(folder, "model.decoder.layers.2.encoder_attn.k_proj.bias"),
    "positions": lambda folder: one_ulp(folder, "model.decoder.embed_positions.weight"),
    "head bias": lambda folder: one_ulp(folder, "final_logits_bias"),
    "untied head": an_untied_head,
    "untied encoder": an_untied_encoder,
    "tokenizer": another_token,
    "scale": lambda folder: edit_json(folder / "config.json", scale_embedding=True),
    "activation": lambda folder: edit_json(folder / "config.json", activation_function="relu"),
    "heads": lambda folder: edit_json(
        folder / "config.json", encoder_attention_heads=2, decoder_attention_heads=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_that_matters_is_another_backbone(folder: Path, backbone: Backbone, change: str) -> None:
    CHANGES[change](folder)
    assert fingerprint(folder) != backbone.spec.fingerprint


@pytest.mark.parametrize("key", ["dropout", "encoder_layerdrop", "init_std", "classifier_dropout"])
def test_settings_of_training_are_no_part_of_the_identity(folder: Path, backbone: Backbone, key: str) -> None:
    edit_json(folder / "config.json", **{key: 0.05})
    assert fingerprint(folder) == backbone.spec.fingerprint


def drop_a_weight(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensors[name] for name in tensors if "encoder_attn.k_proj" not in name})


def no_embedding(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensors[name] for name in tensors if "shared" not in name})


def without_an_end(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: edit_json(folder / "config.json", encoder_attention_heads=2),
            "expected the same number in encoder and decoder, a divisor of d_model=32; got 2 and 4",
        ),
        (
            lambda folder: edit_json(folder / "config.json", encoder_attention_heads=5, decoder_attention_heads=5),
            "a divisor of d_model=32; got 5 and 5",
        ),
        (lambda folder: edit_json(folder / "config.json", activation_function="silu"), "expected gelu_new or .* silu"),
        (lambda folder: edit_json(folder / "config.json", is_encoder_decoder=False), "expected True, got False"),
        (lambda folder: edit_json(folder / "generation_config.json", decoder_start_token_id=320), "from 0 to 319"),
        (lambda folder: edit_json(folder / "generation_config.json", forced_bos_token_id=-1), "from 0 to 319, got -1"),
        (lambda folder: edit_json(folder / "generation_config.json", forced_eos_token_id=[2, 3]), "expected one id"),
        (lambda folder: edit_json(folder / "config.json", max_position_embeddings=32), "cannot load its weights"),
        (drop_a_weight, "missing model.decoder.layers.0.encoder_attn.k_proj.bias"),
        (no_embedding, "missing .*model.shared.weight|expected in the checkpoint"),
        (without_an_end, "expected a tokenizer with tokens for begin and end"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


@pytest.mark.corpora
def test_the_published_tokenizer_loads_and_the_template_is_its_own_encoding(tmp_path: Path) -> None:
    if not PUBLISHED_TOKENIZER.exists():
        pytest.skip(f"needs {PUBLISHED_TOKENIZER}")
    save_tiny_bart(tmp_path, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, layers=(1, 1), vocab_size=50265)
    for stale in tmp_path.glob("tokenizer*"):
        stale.unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(PUBLISHED_TOKENIZER / name, tmp_path)
    backbone = load_backbone(str(tmp_path))
    for text in ("Hello world", " name : Blue Spice | Type : coffee shop", "café ☕\n\n1,024 tokens", ""):
        ids = encode_prompt(backbone.tokenizer, backbone.input_template, text)
        assert ids == backbone.tokenizer(text).input_ids
    assert encode_prompt(backbone.tokenizer, backbone.input_template, "Hello world") == [0, 31414, 232, 2]
