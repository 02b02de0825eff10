"""Import from and export to PEFT for decoder-only models, against PEFT's own forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from prefixes.artifact import Prefix, read_prefix, write_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import IncompatiblePrefix, InvalidArtifact
from prefixes.formats.peft import import_peft
from prefixes.formats.peft_export import export_peft
from tests.support.llama import save_tiny_llama
from tests.support.prefixes import make_prefix, save_tiny_gpt2

LENGTH = 5
IDS = torch.tensor([[17, 4, 250, 9, 33, 8], [1, 2, 3, 4, 5, 6]])

CONFIGS: dict[str, Callable[[], Any]] = {
    "direct": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=False),
    "projected": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_frozen_tokens=2),
}


LLAMAS = ("llama", "llama3", "yarn", "mistral", "qwen3", "smollm3")
"""With shared key heads; among them heads of another size than hidden / heads, scaled rotations, layers without any."""


@pytest.fixture(scope="module", params=["gpt2", *LLAMAS])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("backbone")
    if request.param == "gpt2":
        save_tiny_gpt2(folder)
    else:
        save_tiny_llama(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def backbone(saved: Path) -> Backbone:
    return load_backbone(str(saved))


@pytest.fixture(scope="module", params=CONFIGS)
def adapter(request: pytest.FixtureRequest, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder with random weights, saved by PEFT."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved), CONFIGS[request.param]())
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    folder: Path = tmp_path_factory.mktemp(request.param)
    model.eval().save_pretrained(folder)
    torch.save(model(input_ids=IDS).logits.detach(), folder / "logits.pt")
    return folder


def peft_logits(saved: Path, folder: Path) -> torch.Tensor:
    """What PEFT itself computes after loading the folder."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), folder).eval()
    logits: torch.Tensor = model(input_ids=IDS).logits.detach()
    return logits


def cache_of(prefix: Prefix, rows: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(prefix.tensors["decoder.key"].shape[0]):
        pair = (prefix.tensors[f"decoder.{part}"][layer] for part in ("key", "value"))  # (prefix_len, heads, head_dim)
        key, value = (tensor.transpose(0, 1).expand(rows, -1, -1, -1).contiguous() for tensor in pair)
        cache.update(key, value, layer)  # (rows, heads, prefix_len, head_dim)
    return cache


def our_logits(backbone: Backbone, prefix: Prefix, *, offset: int) -> torch.Tensor:
    """transformers with the prefix as its cache, tokens at positions from ``offset``."""
    positions = torch.arange(IDS.shape[1])[None] + offset
    logits: torch.Tensor = backbone.model(
        input_ids=IDS,
        past_key_values=cache_of(prefix, IDS.shape[0]),
        attention_mask=torch.ones(IDS.shape[0], LENGTH + IDS.shape[1]),
        position_ids=positions.expand_as(IDS),
    ).logits
    return logits


def test_an_imported_prefix_gives_pefts_logits(adapter: Path, saved: Path, backbone: Backbone) -> None:
    prefix = import_peft(adapter, backbone.spec)
    prefix = read_prefix(write_prefix(prefix))
    expected = peft_logits(saved, adapter)
    trained = torch.load(adapter / "logits.pt", weights_only=True)
    offset = prefix.spec.position_offset("decoder")
    torch.testing.assert_close(our_logits(backbone, prefix, offset=offset), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=0)
    assert (expected - backbone.model(IDS).logits).abs().max() > 0.1  # or the prefix did nothing


def test_pefts_tokens_start_behind_the_prefix(adapter: Path, saved: Path, backbone: Backbone) -> None:
    """`shifted`: with positions from 0 the logits are others."""
    prefix = import_peft(adapter, backbone.spec)
    assert prefix.spec.sites["decoder"].positions == "shifted"
    assert prefix.spec.position_offset("decoder") == LENGTH
    difference = our_logits(backbone, prefix, offset=0) - peft_logits(saved, adapter)
    assert difference.abs().max() > 0.1


def test_pefts_generate_gives_the_tokens_of_our_positions(adapter: Path, saved: Path, backbone: Backbone) -> None:
    prefix = import_peft(adapter, backbone.spec)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), adapter).eval()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt, mask = IDS[:1], torch.ones_like(IDS[:1])
    tokens = model.generate(input_ids=prompt, attention_mask=mask, **settings)[0, prompt.shape[1] :].tolist()
    ours: list[int] = []
    for _ in range(8):
        ids = torch.tensor([[*IDS[0].tolist(), *ours]])
        mask = torch.ones(1, LENGTH + ids.shape[1])
        logits = backbone.model(ids, past_key_values=cache_of(prefix, 1), attention_mask=mask).logits[0, -1]
        logits[0] = -torch.inf  # min_new_tokens bans the end token
        ours.append(int(logits.argmax()))
    assert tokens == ours


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
def test_peft_loads_an_exported_prefix_with_equal_logits(
    saved: Path, backbone: Backbone, tmp_path: Path, peft_type: Any
) -> None:
    prefix = make_prefix(backbone.spec, length=LENGTH, seed=7)
    folder, options = tmp_path / "adapter", {"peft_type": peft_type, "num_frozen_tokens": 2}
    export_peft(prefix, folder, backbone.spec, base_model=str(saved), **options)
    expected = our_logits(backbone, prefix, offset=LENGTH)
    torch.testing.assert_close(peft_logits(saved, folder), expected, atol=1e-5, rtol=0)


def test_import_then_export_is_pefts_own_tensor(adapter: Path, backbone: Backbone, tmp_path: Path) -> None:
    prefix = import_peft(adapter, backbone.spec)
    export_peft(prefix, tmp_path, backbone.spec)  # an empty folder is as good as a new one
    original, ours = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path))
    assert ours.keys() == original.keys() == {"prompt_embeddings"}
    assert torch.equal(ours["prompt_embeddings"], original["prompt_embeddings"])
    again = import_peft(tmp_path, backbone.spec)
    assert all(torch.equal(again.tensors[name], prefix.tensors[name]) for name in prefix.tensors)


def test_a_cartridge_comes_back_with_its_frozen_tokens(good: Path, backbone: Backbone, tmp_path: Path) -> None:
    edit(good, peft_type="CARTRIDGE", num_frozen_tokens=3)
    prefix = read_prefix(write_prefix(import_peft(good, backbone.spec)))
    said = []
    for frozen in (None, 0):
        export_peft(prefix, tmp_path / f"{frozen}", backbone.spec, peft_type="CARTRIDGE", num_frozen_tokens=frozen)
        said.append(PeftConfig.from_pretrained(str(tmp_path / f"{frozen}")).num_frozen_tokens)
    assert said == [3, 0]


def test_template_and_defaults_come_from_the_importer(adapter: Path, backbone: Backbone) -> None:
    prefix = import_peft(adapter, backbone.spec, template="{input} =>", defaults={"num_beams": 5})
    assert prefix.spec.template == "{input} =>"
    assert prefix.spec.defaults == {"num_beams": 5}
    assert prefix.spec.origin["method"] == "peft"
    assert prefix.spec.fingerprint == backbone.spec.fingerprint


@pytest.fixture
def good(backbone: Backbone, tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    export_peft(make_prefix(backbone.spec, length=LENGTH), folder, backbone.spec)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": torch.zeros(LENGTH, 128)}, folder / "adapter_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def fill_the_window(folder: Path) -> None:
    edit(folder, num_virtual_tokens=64)
    save(folder, prompt_embeddings=torch.zeros(64, 128))


@pytest.mark.parametrize("saved", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), InvalidArtifact, r"expected a PEFT folder"),
        (lambda f: (f / "adapter_config.json").write_text("{"), InvalidArtifact, "expected JSON"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), InvalidArtifact, "found none"),
        (only_pickle, InvalidArtifact, "only a pickled one, which is never opened"),
        (truncate, InvalidArtifact, "expected a safetensors file"),
        (lambda f: edit(f, peft_type="LORA"), InvalidArtifact, "expected PREFIX_TUNING or CARTRIDGE, got LORA"),
        (lambda f: edit(f, task_type="SEQ_2_SEQ_LM"), IncompatiblePrefix, "CAUSAL_LM for a gpt2 .* got SEQ_2_SEQ_LM"),
        (
            lambda f: edit(f, num_transformer_submodules=2),
            InvalidArtifact,
            "submodules: expected 1 for CAUSAL_LM, got 2",
        ),
        (
            lambda f: edit(f, task_type="SEQ_CLS"),
            InvalidArtifact,
            "expected CAUSAL_LM for a gpt2 backbone, got SEQ_CLS",
        ),
        (lambda f: edit(f, num_layers=3), IncompatiblePrefix, "this backbone has 2, the prefix was made for 3"),
        (lambda f: edit(f, num_attention_heads=2), IncompatiblePrefix, "num_attention_heads: this backbone has 4"),
        (lambda f: edit(f, num_virtual_tokens=9), InvalidArtifact, "expected the tensor's 5, got 9"),
        (lambda f: edit(f, peft_type="CARTRIDGE", num_frozen_tokens=6), InvalidArtifact, "expected 0 to .* 5, got 6"),
        (lambda f: save(f, lora=torch.zeros(1)), InvalidArtifact, "the one tensor prompt_embeddings, got lora"),
        (lambda f: save(f, prompt_embeddings=torch.zeros(5, 64)), IncompatiblePrefix, r"expected \(prefix_len, 128\)"),
        (lambda f: save(f, prompt_embeddings=torch.zeros(640)), IncompatiblePrefix, r"got \(640,\)"),
        (lambda f: save(f, prompt_embeddings=torch.zeros(5, 128).int()), InvalidArtifact, "dtype"),
        (lambda f: save(f, prompt_embeddings=torch.zeros(5, 128) / 0), InvalidArtifact, "finite"),
        (fill_the_window, IncompatiblePrefix, "less than the window of 64"),
    ],
)
def test_folders_that_hold_something_else_are_refused(
    good: Path, backbone: Backbone, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(good)
    with pytest.raises(error, match=message):
        import_peft(good, backbone.spec)


def test_another_method_of_pefts_is_named(saved: Path, backbone: Backbone, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved), config).save_pretrained(tmp_path)
    with pytest.raises(InvalidArtifact, match="got PROMPT_TUNING"):
        import_peft(tmp_path, backbone.spec)


def test_what_peft_cannot_hold_is_not_exported(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match=r"expected shifted positions at the decoder .* got unshifted"):
        export_peft(make_prefix(backbone.spec, positions="unshifted"), tmp_path / "a", backbone.spec)
    with pytest.raises(InvalidArtifact, match="0 to 3 frozen tokens"):
        export_peft(
            make_prefix(backbone.spec), tmp_path / "a", backbone.spec, peft_type="CARTRIDGE", num_frozen_tokens=4
        )
    other = replace(backbone.spec, fingerprint="sha256:" + "0" * 64)
    with pytest.raises(IncompatiblePrefix, match="backbone fingerprint"):
        export_peft(make_prefix(backbone.spec), tmp_path / "a", other)
    assert not list(tmp_path.iterdir())


def test_export_never_overwrites(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        export_peft(make_prefix(backbone.spec), tmp_path, backbone.spec)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
