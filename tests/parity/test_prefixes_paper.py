"""Checkpoints of the paper's published code, imported: the keys and values of its forward pass, and its positions."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from prefixes.artifact import Prefix, read_prefix, write_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import IncompatiblePrefix, InvalidArtifact
from prefixes.formats.paper import import_paper
from prefixes.spec import BackboneSpec, Family, Site, SiteGeometry
from tests.support.paper import PublishedPrefix, cut, lightning
from tests.support.prefixes import make_backbone_spec, make_encoder_decoder_spec, save_tiny_gpt2

GPT2 = make_backbone_spec(layers=3, kv_heads=2, head_dim=4)
BART = make_encoder_decoder_spec(encoder_layers=2, decoder_layers=2)
EVERY: tuple[Site, ...] = ("decoder", "encoder", "cross")


def save(folder: Path, state: Any, **config: Any) -> Path:
    """A folder as `save_pretrained` leaves it."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_equal(prefix: Prefix, published: PublishedPrefix, spec: BackboneSpec) -> None:
    assert prefix.spec.sites.keys() == set(published.sites)
    for site in published.sites:
        layers = published.prompt(site)[: spec.sites[site].layers]  # a shallower encoder takes the first ones
        for index, part in enumerate(("key", "value")):
            expected = torch.stack(
                [layer[index][0].transpose(0, 1) for layer in layers]
            )  # (layers, P, heads, head_dim)
            torch.testing.assert_close(prefix.tensors[f"{site}.{part}"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("deep", [False, True])
def test_gpt2s_mlp_is_folded_to_what_it_makes(deep: bool, tmp_path: Path) -> None:
    published = PublishedPrefix(GPT2, length=7, middle=20, deep=deep)
    prefix = import_paper(save(tmp_path / "x", published.state_dict()), GPT2)
    assert_equal(read_prefix(write_prefix(prefix)), published, GPT2)
    assert {site: sited.positions for site, sited in prefix.spec.sites.items()} == {"decoder": "shifted"}
    assert prefix.spec.sites["decoder"].dtype == "float32"
    assert prefix.spec.origin["method"] == "paper"


@pytest.mark.parametrize("layers", [(2, 2), (1, 3)])
@pytest.mark.parametrize("deep", [False, True])
def test_barts_three_mlps_go_each_to_their_site(deep: bool, layers: tuple[int, int], tmp_path: Path) -> None:
    spec = make_encoder_decoder_spec(encoder_layers=layers[0], decoder_layers=layers[1])
    published = PublishedPrefix(spec, length=4, deep=deep)
    prefix = import_paper(save(tmp_path / "checkpointepoch=2.ckpt", published.state_dict()), spec)
    assert_equal(read_prefix(write_prefix(prefix)), published, spec)
    assert {site: sited.positions for site, sited in prefix.spec.sites.items()} == dict.fromkeys(EVERY, "unshifted")
    assert [prefix.spec.position_offset(site) for site in EVERY] == [0, 0, 0]


@pytest.mark.parametrize("sites", [("decoder",), ("decoder", "encoder"), ("decoder", "cross")])
def test_a_site_that_was_switched_off_is_no_site(sites: tuple[Site, ...], tmp_path: Path) -> None:
    published = PublishedPrefix(BART, sites=sites)
    assert_equal(import_paper(save(tmp_path / "x", published.state_dict()), BART), published, BART)


def test_an_encoder_deeper_than_the_decoder_is_refused(tmp_path: Path) -> None:
    """The published code would run off the end of its list: it gives the encoder the decoder's number of layers."""
    spec = make_encoder_decoder_spec(encoder_layers=3, decoder_layers=2)
    with pytest.raises(IncompatiblePrefix, match=r"site 'encoder': .* decoder's 2 and cannot run this backbone's 3"):
        import_paper(save(tmp_path / "x", PublishedPrefix(spec).state_dict()), spec)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["flat", "cache"])
def test_gpt2s_shallow_variants_are_the_keys_and_values_themselves(kind: str, legacy: bool, tmp_path: Path) -> None:
    """Flat `(P * layers * 2 * d,)` where it began random, GPT-2's own cache over words where it did not."""
    rows = torch.randn(6 * 3 * 2 * 8)
    stacked = rows.view(1, 6, 3 * 2, 2, 4).permute(2, 0, 3, 1, 4)  # (layers * 2, 1, heads, P, head_dim)
    tensor = rows if kind == "flat" else stacked.contiguous()
    module = nn.Module()
    module.control_trans = nn.Parameter(tensor)
    folder = save(tmp_path / "x", {}, preseqlen=6 if kind == "flat" else 1, init_shallow_word=[[1]] * (kind == "cache"))
    torch.save(module.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    prefix = import_paper(folder, GPT2)
    for layer, (key, value) in enumerate(cut(stacked)):
        assert torch.equal(prefix.tensors["decoder.key"][layer], key[0].transpose(0, 1))
        assert torch.equal(prefix.tensors["decoder.value"][layer], value[0].transpose(0, 1))


def test_every_way_to_the_same_tensors_gives_the_same_version(tmp_path: Path) -> None:
    """Folder, weights alone, torch's old file format, Lightning with a dictionary or a Namespace of hyperparameters."""
    published = PublishedPrefix(BART)
    folder = save(tmp_path / "x", published.state_dict(), model_type="bart", preseqlen=5)
    options = {"preseqlen": 5, "mid_dim": 12, "format_mode": "cat", "optim_prefix": "yes", "tuning_mode": "prefixtune"}
    paths = [
        folder,
        folder / "pytorch_model.bin",
        *(tmp_path / f"{name}.ckpt" for name in ("old", "dict", "namespace")),
    ]
    torch.save(published.state_dict(), paths[2], _use_new_zipfile_serialization=False)
    torch.save(lightning(published, options), paths[3])
    torch.save(lightning(published, argparse.Namespace(**options)), paths[4])
    assert len({write_prefix(import_paper(path, BART)) for path in paths}) == 1


def test_half_precision_is_folded_in_float32_and_double_in_float64(tmp_path: Path) -> None:
    published = PublishedPrefix(GPT2)
    halves = {name: tensor.half() for name, tensor in published.state_dict().items()}
    published.load_state_dict({name: tensor.float() for name, tensor in halves.items()})
    assert_equal(import_paper(save(tmp_path / "half", halves), GPT2), published, GPT2)
    doubles = {name: tensor.double() for name, tensor in halves.items()}
    prefix = import_paper(save(tmp_path / "double", doubles), GPT2)
    assert prefix.tensors["decoder.key"].dtype == torch.float64


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder: Path = tmp_path_factory.mktemp("backbone")
    save_tiny_gpt2(folder)
    return load_backbone(str(folder), dtype=torch.float64)


def test_gpt2_computes_with_the_import_as_with_the_published_cache(backbone: Backbone, tmp_path: Path) -> None:
    """The published forward pass: every row gets the prompt as its cache, positions count from the cache's length."""
    published = PublishedPrefix(backbone.spec, length=6).double()
    ids = torch.tensor([[17, 4, 250, 9, 33], [1, 2, 3, 4, 5]])
    expected = backbone.model(ids, past_key_values=DynamicCache(published.prompt("decoder", rows=2))).logits
    prefix = import_paper(save(tmp_path / "x", published.state_dict()), backbone.spec)
    cache = DynamicCache()
    for layer in range(backbone.spec.sites["decoder"].layers):
        pair = (
            prefix.tensors[f"decoder.{part}"][layer].transpose(0, 1).expand(2, -1, -1, -1) for part in ("key", "value")
        )
        cache.update(*pair, layer)
    positions = torch.arange(5)[None] + prefix.spec.position_offset("decoder")
    logits = backbone.model(ids, past_key_values=cache, position_ids=positions.expand_as(ids)).logits
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    assert (logits - backbone.model(ids).logits).abs().max() > 0.01  # or the prefix did nothing


def gpt2_state(**changes: Any) -> dict[str, torch.Tensor]:
    """A good GPT-2 checkpoint; a change of None leaves that one out."""
    named: dict[str, Any] = {
        **PublishedPrefix(GPT2).state_dict(),
        **{key.replace("__", "."): v for key, v in changes.items()},
    }
    return {key: tensor for key, tensor in named.items() if tensor is not None}


WITHOUT_MLP = {f"control_trans__{n}__{part}": None for n in (0, 2) for part in ("weight", "bias")}
VARIANTS: list[tuple[dict[str, torch.Tensor], dict[str, Any], type[Exception], str]] = [
    (gpt2_state(), {"use_infix": True}, InvalidArtifact, "got infix-tuning"),
    (gpt2_state(), {"format_mode": "infix"}, InvalidArtifact, "got infix-tuning"),
    (gpt2_state(wte2__weight=torch.zeros(5, 8)), {}, InvalidArtifact, "got infix-tuning .wte2 without control_trans2"),
    (gpt2_state(), {"optim_prefix": False}, InvalidArtifact, "got control codes"),
    (gpt2_state(wte__weight=None), {}, InvalidArtifact, "without wte.weight: control codes"),
    (gpt2_state(wte__weight=torch.zeros(100, 8)), {}, InvalidArtifact, "a vocabulary of 100"),
    (gpt2_state(**WITHOUT_MLP), {}, InvalidArtifact, "a prefix of embeddings .wte alone"),
    (gpt2_state(control_trans__2__weight=torch.zeros(8, 12), control_trans__2__bias=torch.zeros(8)), {},
     InvalidArtifact, "a prefix of embeddings .control_trans ends in 8"),
    (gpt2_state(control_trans__2__weight=None, control_trans__2__bias=None), {}, InvalidArtifact,
     "got at site 'decoder' control_trans.0.bias, control_trans.0.weight, wte.weight"),
    (gpt2_state(control_trans__6__weight=torch.zeros(1)), {}, InvalidArtifact, "control_trans.6.weight"),
    (gpt2_state(control_trans__0__bias=None), {}, InvalidArtifact, "got at site 'decoder'"),
    (gpt2_state(LayerNorm__weight=torch.zeros(8)), {}, InvalidArtifact, "got also LayerNorm.weight"),
    (gpt2_state(wte3__weight=torch.zeros(8)), {}, InvalidArtifact, "got also wte3.weight"),
    ({"transformer.h.0.attn.bias": torch.zeros(1)}, {}, InvalidArtifact, "got transformer.h.0.attn.bias"),
    ({f"prompt.{n}": torch.zeros(1) for n in range(20)}, {}, InvalidArtifact, "prompt.0, prompt.1, .*prompt.15, …"),
    (PublishedPrefix(BART).state_dict(), {}, IncompatiblePrefix, "gpt2 backbone has only decoder, .*encoder, cross"),
    (gpt2_state(), {"model_type": "bart"}, IncompatiblePrefix, "model_type: this backbone has gpt2, .* for bart"),
    (gpt2_state(), {"n_layer": 24}, IncompatiblePrefix, "n_layer: this backbone has 3, .* for 24"),
    (gpt2_state(), {"n_head": 4}, IncompatiblePrefix, "n_head: this backbone has 2, .* for 4"),
    (gpt2_state(), {"n_embd": 16}, IncompatiblePrefix, "n_embd: this backbone has 8, .* for 16"),
    (gpt2_state(), {"preseqlen": 9}, InvalidArtifact, "preseqlen: expected the tensors' 5, got 9"),
    (gpt2_state(wte__weight=torch.zeros(5, 16)), {}, IncompatiblePrefix, r"expected wte \(P, 8\) .* got \(5, 16\)"),
    (gpt2_state(control_trans__2__weight=torch.zeros(96, 12), control_trans__2__bias=torch.zeros(96)), {},
     IncompatiblePrefix, r"expected .*\(48, 12\).* got .*\(96, 12\)"),
    (gpt2_state(control_trans__2__weight=torch.zeros(48, 11)), {}, IncompatiblePrefix, r"\(48, 12\).* got .*48, 11"),
    (gpt2_state(control_trans__2__bias=torch.zeros(47)), {}, IncompatiblePrefix, "expected wte"),
    (gpt2_state(control_trans__0__bias=torch.zeros(12, 1)), {}, IncompatiblePrefix, "expected wte"),
    (gpt2_state(wte__weight=torch.zeros(64, 8)), {}, IncompatiblePrefix, "less than the window of 64"),
    ({"control_trans": torch.zeros(100)}, {}, IncompatiblePrefix, r"expected \(P \* 48,\) or .* got \(100,\)"),
    ({"control_trans": torch.zeros(6, 1, 2, 5, 3)}, {}, IncompatiblePrefix, r"\(6, 1, 2, P, 4\), got"),
    ({"control_trans": torch.zeros(6, 2, 2, 5, 4)}, {}, IncompatiblePrefix, r"got \(6, 2, 2, 5, 4\)"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "config", "error", "message"), VARIANTS, ids=[case[3][:40] for case in VARIANTS])
def test_other_variants_and_geometries_are_refused_by_name(
    state: Any, config: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        import_paper(save(tmp_path / "x", state, **config), GPT2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: this backbone has bart, .* for gpt2"),
        ({"encoder_layers": 12}, "encoder_layers: this backbone has 2, .* for 12"),
        ({"decoder_attention_heads": 16}, "decoder_attention_heads: this backbone has 2"),
        ({"d_model": 1024}, "d_model: this backbone has 8"),
    ],
)
def test_another_barts_checkpoint_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(IncompatiblePrefix, match=message):
        import_paper(save(tmp_path / "x", PublishedPrefix(BART).state_dict(), **config), BART)


def test_a_lightning_checkpoint_of_a_variant_is_refused(tmp_path: Path) -> None:
    torch.save(lightning(PublishedPrefix(BART), argparse.Namespace(format_mode="infix")), tmp_path / "a.ckpt")
    with pytest.raises(InvalidArtifact, match="got infix-tuning"):
        import_paper(tmp_path / "a.ckpt", BART)


def test_words_may_set_another_length_than_preseqlen(tmp_path: Path) -> None:
    """In the low-data setting the published code takes the initialisation's number of tokens and leaves `preseqlen`."""
    published = PublishedPrefix(GPT2, length=3)
    folder = save(tmp_path / "x", published.state_dict(), preseqlen=5, lowdata_token=[[11, 22, 33]])
    assert import_paper(folder, GPT2).spec.length("decoder") == 3


def test_another_number_of_layers_with_the_same_width_is_refused(tmp_path: Path) -> None:
    other = replace(GPT2, sites={"decoder": SiteGeometry(4, 2, 4)})
    with pytest.raises(IncompatiblePrefix, match="as this backbone's 4 layers of width 8 need"):
        import_paper(save(tmp_path / "x", PublishedPrefix(GPT2).state_dict()), other)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_paper_knew_gpt2_and_bart_alone(tmp_path: Path, family: Family) -> None:
    folder = save(tmp_path / "x", PublishedPrefix(GPT2).state_dict())
    with pytest.raises(IncompatiblePrefix, match=f"expected a gpt2 or bart backbone, got a {family} one"):
        import_paper(folder, replace(GPT2, family=family))


def test_template_and_defaults_come_from_the_importer(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", PublishedPrefix(GPT2).state_dict(), _my_arg_task_mode="data2text")
    spec = import_paper(folder, GPT2, template="{input} <|endoftext|>", defaults={"num_beams": 5}).spec
    assert (spec.template, spec.defaults) == ("{input} <|endoftext|>", {"num_beams": 5})
    assert spec.origin == {"method": "paper", "parametrization": "mlp", "task_mode": "data2text"}
    assert spec.fingerprint == GPT2.fingerprint
