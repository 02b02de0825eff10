"""PEFT's encoder-decoder prefixes in and out: the decoder alone, and there PEFT's own logits and tokens, in float64.

The oracles are PEFT's forward pass and ``generate``; the imported prefix computes through the plain reference, which
knows neither PEFT nor a cache, and through transformers with a cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BartForConditionalGeneration, DynamicCache, EncoderDecoderCache

from prefixes.artifact import Prefix, read_prefix, write_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import IncompatiblePrefix, InvalidArtifact
from prefixes.formats.peft import import_peft
from prefixes.formats.peft_export import export_peft
from prefixes.formats.peft_layout import taken_layers
from prefixes.spec import Site
from server.engine.types import SamplingParams
from tests.support.bart import random_bart_prefix, save_tiny_bart
from tests.support.bart_reference import parts_of, reference_generate, reference_logits
from tests.support.prefixes import make_backbone_spec, make_prefix

LENGTH = 4
INPUT = [0, 17, 40, 250, 9, 33, 2]
OUTPUT = [2, 0, 61, 12, 300, 7, 61]
DTYPE = torch.float64

Layers = tuple[int, int]
PREFIX, CARTRIDGE = "prefix", "cartridge"
# kind of adapter, layers of encoder and decoder, num_layers where not PEFT's own choice (the encoder's)
CASES: list[tuple[str, Layers, int | None]] = [
    (PREFIX, (1, 1), None), (PREFIX, (2, 2), None), (PREFIX, (3, 3), None), (PREFIX, (4, 4), None),
    (PREFIX, (6, 6), None), (PREFIX, (4, 2), None), (PREFIX, (3, 2), None), (PREFIX, (6, 4), None),
    (PREFIX, (2, 3), 3), (PREFIX, (2, 4), 6), ("projected", (4, 3), None), (CARTRIDGE, (2, 2), None),
    (CARTRIDGE, (6, 3), None),
]  # fmt: skip


class Case:
    """A backbone, a PEFT folder for it with random weights, and the prefix that we import from that folder."""

    def __init__(self, root: Path, kind: str, layers: Layers, num_layers: int | None) -> None:
        self.saved, self.folder = root / "backbone", root / "adapter"
        self.backbone = saved_bart(self.saved, layers)
        save_adapter(self.saved, self.folder, kind, num_layers)
        self.prefix = read_prefix(write_prefix(import_peft(self.folder, self.backbone.spec)))

    def peft(self) -> Any:
        base = BartForConditionalGeneration.from_pretrained(self.saved, dtype=DTYPE)
        return PeftModel.from_pretrained(base, self.folder).to(DTYPE).eval()


def saved_bart(folder: Path, layers: Layers) -> Backbone:
    save_tiny_bart(folder, layers=layers, dtype=DTYPE)
    return load_backbone(str(folder), dtype=DTYPE)


def save_adapter(saved: Path, folder: Path, kind: str, num_layers: int | None = None, length: int = LENGTH) -> None:
    shared: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": length, "num_layers": num_layers}
    config = {
        PREFIX: lambda: PrefixTuningConfig(**shared),
        "projected": lambda: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **shared),
        CARTRIDGE: lambda: CartridgeConfig(num_frozen_tokens=2, **shared),
    }[kind]()
    torch.manual_seed(1)
    model = get_peft_model(BartForConditionalGeneration.from_pretrained(saved, dtype=DTYPE), config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    model.eval().save_pretrained(folder)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("peft"), *request.param)


def peft_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([INPUT]), decoder_input_ids=torch.tensor([OUTPUT])).logits[
            0
        ]
    return logits


def our_logits(backbone: Backbone, prefix: Prefix, positions: Mapping[Site, str] | None = None) -> torch.Tensor:
    tensors, counted = parts_of(prefix, DTYPE)
    return reference_logits(backbone.model, INPUT, OUTPUT, tensors, positions or counted)


def test_an_imported_prefix_gives_pefts_logits(case: Case) -> None:
    expected = peft_logits(case.peft())
    torch.testing.assert_close(our_logits(case.backbone, case.prefix), expected, atol=1e-10, rtol=0)
    bare = reference_logits(case.backbone.model, INPUT, OUTPUT, {}, {})
    assert (expected - bare).abs().max() > 0.1  # or the prefix did nothing


def test_an_imported_prefix_as_transformers_cache_gives_pefts_logits(case: Case) -> None:
    """Positions are left to transformers: it counts them from the cache, whatever the artifact says."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(*parts_of(case.prefix, DTYPE)[0]["decoder"], strict=True)):
        cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)  # (1, heads, prefix_len, head_dim)
    with torch.inference_mode():
        logits = case.backbone.model(
            input_ids=torch.tensor([INPUT]),
            decoder_input_ids=torch.tensor([OUTPUT]),
            past_key_values=EncoderDecoderCache(cache, DynamicCache()),
        ).logits[0]
    torch.testing.assert_close(logits, peft_logits(case.peft()), atol=1e-10, rtol=0)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_imported_prefix_gives_the_tokens_of_pefts_generate(case: Case, num_beams: int) -> None:
    """Position and layers once more, through PEFT's other path, which makes its cache on the first step."""
    settings: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 6, "num_beams": num_beams}
    model = case.peft()
    with torch.inference_mode():
        tokens = model.generate(input_ids=torch.tensor([INPUT]), do_sample=False, **settings)[0, 1:].tolist()
    params = SamplingParams(**settings)
    backbone, (tensors, positions) = case.backbone, parts_of(case.prefix, DTYPE)
    ours, _ = reference_generate(
        backbone.model, INPUT, tensors, positions, params, backbone.decoder_prompt, backbone.forced_first,
        backbone.forced_last, backbone.eos_token_ids,
    )[0]  # fmt: skip
    assert ours == tokens


def test_pefts_tokens_start_behind_the_prefix(case: Case) -> None:
    """`shifted`: with positions from 0 the logits are others."""
    assert {site: sited.positions for site, sited in case.prefix.spec.sites.items()} == {"decoder": "shifted"}
    difference = our_logits(case.backbone, case.prefix, {"decoder": "unshifted"}) - peft_logits(case.peft())
    assert difference.abs().max() > 1e-3


def test_decoder_layer_i_takes_trained_layer_2i_mod_l(case: Case) -> None:
    """The rule, stated on the file's own tensor; that it is PEFT's is what the logits above say."""
    flat = load_file(case.folder / "adapter_model.safetensors")["prompt_embeddings"]
    trained = json.loads((case.folder / "adapter_config.json").read_text())["num_layers"]
    pairs = flat.view(LENGTH, trained, 2, 4, 8)
    for layer in range(case.backbone.spec.sites["decoder"].layers):
        for part, name in enumerate(("key", "value")):
            expected = pairs[:, 2 * layer % trained, part]
            assert torch.equal(case.prefix.tensors[f"decoder.{name}"][layer], expected)


def test_trained_layers_that_no_decoder_layer_takes_change_nothing_in_peft_either(tmp_path: Path) -> None:
    """With 4 layers PEFT uses trained layers 0 and 2, twice; 1 and 3 are trained in vain."""
    case = Case(tmp_path, PREFIX, (4, 4), None)
    assert taken_layers(case.backbone.spec, 4) == (0, 2, 0, 2)
    model = case.peft()
    before = peft_logits(model)
    weight = model.prompt_encoder["default"].embedding.weight.data.view(LENGTH, 4, -1)
    weight[:, [1, 3]] += 1
    assert torch.equal(peft_logits(model), before)
    weight[:, 2] += 1
    assert not torch.equal(peft_logits(model), before)


def test_a_decoder_deeper_than_what_was_trained_is_refused_because_peft_fails(tmp_path: Path) -> None:
    """PEFT trains as many layers as the encoder has; a deeper decoder then runs off the end of its cache."""
    backbone = saved_bart(tmp_path / "backbone", (2, 3))
    save_adapter(tmp_path / "backbone", tmp_path / "adapter", PREFIX)
    base = BartForConditionalGeneration.from_pretrained(tmp_path / "backbone", dtype=DTYPE)
    with pytest.raises(IndexError):
        peft_logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    with pytest.raises(IncompatiblePrefix, match=r"num_layers: expected at least 3, .* got 2: PEFT itself cannot run"):
        import_peft(tmp_path / "adapter", backbone.spec)


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("layers", [(1, 1), (2, 2), (2, 3), (6, 6), (3, 4)])
def test_peft_computes_the_same_with_an_exported_decoder_prefix(layers: Layers, peft_type: Any, tmp_path: Path) -> None:
    """With a number of trained layers of our choice every decoder layer gets its own, also where PEFT's would not."""
    backbone = saved_bart(tmp_path / "backbone", layers)
    prefix = random_bart_prefix(backbone.spec, ["decoder"], LENGTH, "shifted", seed=3, dtype=DTYPE)
    export_peft(prefix, tmp_path / "adapter", backbone.spec, peft_type=peft_type, base_model="x", num_frozen_tokens=1)
    base = BartForConditionalGeneration.from_pretrained(tmp_path / "backbone", dtype=DTYPE)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").to(DTYPE).eval()
    torch.testing.assert_close(peft_logits(model), our_logits(backbone, prefix), atol=1e-10, rtol=0)
    again = import_peft(tmp_path / "adapter", backbone.spec)
    assert again.spec.sites == prefix.spec.sites
    assert all(torch.equal(again.tensors[name], prefix.tensors[name]) for name in prefix.tensors)


def test_an_imported_prefix_goes_back_to_peft_with_equal_logits(case: Case, tmp_path: Path) -> None:
    export_peft(case.prefix, tmp_path, case.backbone.spec)
    base = BartForConditionalGeneration.from_pretrained(case.saved, dtype=DTYPE)
    model = PeftModel.from_pretrained(base, tmp_path).to(DTYPE).eval()
    torch.testing.assert_close(peft_logits(model), peft_logits(case.peft()), atol=1e-10, rtol=0)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return saved_bart(tmp_path_factory.mktemp("backbone"), (3, 2))


@pytest.mark.parametrize("sites", [("decoder", "cross"), ("encoder",), ("cross",), ("decoder", "encoder", "cross")])
def test_a_prefix_on_other_sites_is_not_exported_and_the_error_names_them(
    sites: tuple[Site, ...], backbone: Backbone, tmp_path: Path
) -> None:
    prefix = make_prefix(backbone.spec, sites=sites)
    with pytest.raises(InvalidArtifact, match=f"the decoder alone, .* got one at {', '.join(sites)}"):
        export_peft(prefix, tmp_path / "adapter", backbone.spec)
    assert not list(tmp_path.iterdir())


def test_an_unshifted_prefix_is_not_exported(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match=r"expected shifted positions at the decoder .* got unshifted"):
        export_peft(make_prefix(backbone.spec, positions="unshifted"), tmp_path / "adapter", backbone.spec)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def good(backbone: Backbone, tmp_path: Path) -> Path:
    export_peft(make_prefix(backbone.spec, length=LENGTH), tmp_path / "good", backbone.spec)
    return tmp_path / "good"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: edit(f, task_type="CAUSAL_LM"), IncompatiblePrefix, "SEQ_2_SEQ_LM for a bart .* got CAUSAL_LM"),
        (lambda f: edit(f, task_type=None), InvalidArtifact, "expected SEQ_2_SEQ_LM for a bart backbone, got None"),
        (lambda f: edit(f, num_transformer_submodules=1), InvalidArtifact, "expected 2 for SEQ_2_SEQ_LM, got 1"),
        (lambda f: edit(f, num_layers=1), IncompatiblePrefix, "expected at least 2, this backbone's decoder layers"),
        (lambda f: edit(f, num_layers="3"), IncompatiblePrefix, "expected at least 2"),
        (lambda f: edit(f, num_layers=4), IncompatiblePrefix, r"expected \(prefix_len, 256\), got \(4, 192\)"),
        (lambda f: edit(f, token_dim=16), IncompatiblePrefix, "token_dim: this backbone has 32"),
        (lambda f: edit(f, num_attention_heads=2), IncompatiblePrefix, "num_attention_heads: this backbone has 4"),
    ],
)
def test_folders_for_something_else_are_refused(
    good: Path, backbone: Backbone, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(good)
    with pytest.raises(error, match=message):
        import_peft(good, backbone.spec)


def test_a_folder_that_leaves_num_layers_to_peft_has_the_encoders(good: Path, backbone: Backbone) -> None:
    """As PEFT itself reads it: `num_hidden_layers` of a BART configuration is the encoder's."""
    edit(good, num_layers=None)
    assert backbone.model.config.num_hidden_layers == 3
    assert import_peft(good, backbone.spec).spec.sites["decoder"].geometry.layers == 2


def test_an_encoder_decoders_folder_is_no_decoder_only_models(good: Path) -> None:
    with pytest.raises(IncompatiblePrefix, match="expected CAUSAL_LM for a gpt2 backbone, got SEQ_2_SEQ_LM"):
        import_peft(good, make_backbone_spec(layers=2, kv_heads=4, head_dim=8))
