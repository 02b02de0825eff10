"""The loader: one identity per backbone however it was saved, another for any change, named errors for the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import BackboneError
from tests.support.prefixes import save_tiny_gpt2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("backbone")
    save_tiny_gpt2(folder)
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


def fingerprint(folder: Path) -> str:
    return load_backbone(str(folder)).spec.fingerprint


def test_the_model_is_frozen_and_described(backbone: Backbone) -> None:
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    spec = backbone.spec
    assert (spec.family, spec.hidden_size, spec.vocab_size, spec.max_positions) == ("gpt2", 32, 304, 64)
    assert {site: geometry.as_dict() for site, geometry in spec.sites.items()} == {
        "decoder": {"layers": 2, "kv_heads": 4, "head_dim": 8}
    }
    assert backbone.eos_token_ids == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_fingerprint_is_taken_before_the_cast(saved: Path, backbone: Backbone, dtype: torch.dtype) -> None:
    cast = load_backbone(str(saved), dtype=dtype)
    assert {parameter.dtype for parameter in cast.model.parameters()} == {dtype}
    assert cast.spec == backbone.spec


def test_saving_again_keeps_the_identity(backbone: Backbone, tmp_path: Path) -> None:
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == backbone.spec.fingerprint


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def as_the_hub_has_it(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published GPT-2: names without `transformer.`, causal mask buffers beside the weights."""
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return renamed | {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}


def with_the_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


def with_only_the_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"lm_head.weight" if "wte" in name else name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", [as_the_hub_has_it, with_the_head, with_only_the_head])
def test_one_identity_for_every_form_of_one_checkpoint(
    folder: Path, backbone: Backbone, form: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    rewrite(folder, form)
    assert fingerprint(folder) == backbone.spec.fingerprint


def test_shards_are_the_same_backbone(folder: Path, backbone: Backbone) -> None:
    backbone.model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert fingerprint(folder) == backbone.spec.fingerprint


def test_vocabulary_files_and_tokenizer_json_are_the_same_tokenizer(folder: Path, backbone: Backbone) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, state["merges"])]))
    (folder / "tokenizer.json").unlink()
    assert fingerprint(folder) == backbone.spec.fingerprint


def one_ulp(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = tensors["transformer.h.1.mlp.c_proj.weight"]
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
        return tensors

    rewrite(folder, change)


def another_dtype(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensor.double() for name, tensor in tensors.items()})


def an_untied_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})


def another_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(folder)


def another_merge_order(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    GPT2Tokenizer(vocab=state["vocab"], merges=merges[:-1]).save_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        one_ulp,
        another_dtype,
        an_untied_head,
        another_token,
        another_merge_order,
        lambda folder: edit_json(folder / "config.json", layer_norm_epsilon=2e-5),
        lambda folder: edit_json(folder / "config.json", n_head=2),
        lambda folder: edit_json(folder / "config.json", activation_function="gelu"),
    ],
)
def test_any_change_that_matters_is_another_backbone(
    folder: Path, backbone: Backbone, change: Callable[[Path], None]
) -> None:
    change(folder)
    assert fingerprint(folder) != backbone.spec.fingerprint


@pytest.mark.parametrize("key", ["initializer_range", "resid_pdrop", "summary_first_dropout"])
def test_settings_of_training_are_no_part_of_the_identity(folder: Path, backbone: Backbone, key: str) -> None:
    edit_json(folder / "config.json", **{key: 0.05})
    assert fingerprint(folder) == backbone.spec.fingerprint


def test_generation_defaults_are_those_that_the_folder_sets(folder: Path) -> None:
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 50, "eos_token_id": [0, 5]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    backbone = load_backbone(str(folder))
    assert backbone.generation_defaults == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 50}
    assert backbone.eos_token_ids == (0, 5)


def test_the_loaded_weights_are_the_checkpoints(saved: Path, backbone: Backbone) -> None:
    stored = load_file(saved / "model.safetensors")
    loaded = dict(backbone.model.named_parameters())
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def drop_a_weight(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensors[name] for name in tensors if "h.1.ln_1.bias" not in name})


def another_shape(folder: Path) -> None:
    edit_json(folder / "config.json", n_inner=100)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def many_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{index}>" for index in range(10)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_json(folder / "config.json", model_type="opt"), "expected gpt2 or bart or llama"),
        (lambda folder: edit_json(folder / "config.json", model_type="nonsense"), "cannot read its configuration"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read its configuration"),
        (lambda folder: (folder / "config.json").unlink(), "cannot read its configuration"),
        (
            lambda folder: edit_json(folder / "config.json", scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx: expected False, got True",
        ),
        (lambda folder: edit_json(folder / "config.json", reorder_and_upcast_attn=True), "expected False, got True"),
        (lambda folder: edit_json(folder / "config.json", add_cross_attention=True), "expected False, got True"),
        (lambda folder: edit_json(folder / "config.json", scale_attn_weights=False), "expected True, got False"),
        (lambda folder: edit_json(folder / "config.json", activation_function="silu"), "expected gelu_new or .* silu"),
        (lambda folder: edit_json(folder / "config.json", n_head=5), "expected a multiple of n_head=5, got 32"),
        (lambda folder: edit_json(folder / "generation_config.json", eos_token_id=999), "expected ids from 0 to 303"),
        (lambda folder: edit_json(folder / "generation_config.json", top_k="all"), "generation config|cannot load"),
        (drop_a_weight, "missing transformer.h.1.ln_1.bias"),
        (another_shape, "cannot load its weights|missing"),
        (pickled, "pickled checkpoints are not read"),
        (truncated, "cannot read its checkpoint"),
        (shard_elsewhere, "expected shards beside"),
        (no_tokenizer, "expected a tokenizer beside the weights"),
        (many_tokens, "expected a tokenizer with ids from 0 to 303, got ids up to 309"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


@pytest.mark.parametrize("name", ["", "/nowhere/at/all", "./nowhere", "~/nowhere-at-all"])
def test_a_path_that_is_no_folder_is_never_looked_up_elsewhere(name: str) -> None:
    with pytest.raises(BackboneError, match="expected a folder"):
        load_backbone(name)


HUB = """
import sys
from prefixes.backbone import load_backbone
print(load_backbone("somebody/tiny-gpt2").spec.fingerprint)
"""


@pytest.mark.slow
def test_a_hub_id_loads_from_the_cache_with_the_same_identity(saved: Path, backbone: Backbone, tmp_path: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    entry = tmp_path / "models--somebody--tiny-gpt2"
    shutil.copytree(saved, entry / "snapshots" / revision)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(revision)
    run = subprocess.run(
        [sys.executable, "-c", HUB],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()},  # noqa: PTH109
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.split()[-1] == backbone.spec.fingerprint


def test_logits_are_those_of_the_saved_model(saved: Path, backbone: Backbone) -> None:
    ids = torch.arange(5)[None]
    expected = GPT2LMHeadModel.from_pretrained(saved).eval()(ids).logits
    assert torch.equal(backbone.model(ids).logits, expected)
