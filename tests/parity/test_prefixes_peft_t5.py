"""PEFT's T5 prefixes in and out: at the decoder, before the tokens, with PEFT's own logits and tokens, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from prefixes.errors import InvalidArtifact
from prefixes.formats.peft import import_peft
from prefixes.formats.peft_export import export_peft
from server.engine.types import SamplingParams
from tests.support.bart import random_bart_prefix
from tests.support.bart_reference import parts_of
from tests.support.t5 import KINDS, tiny_t5
from tests.support.t5_reference import reference_generate, reference_logits

LENGTH = 50  # longer than the bias reaches
INPUT, OUTPUT = [17, 40, 250, 9, 33, 1], [0, 61, 12, 300, 7, 61]


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """As deep as its encoder: PEFT and ``generate`` make a cache of the encoder's depth."""
    return tiny_t5(tmp_path_factory.mktemp("t5"), request.param, num_layers=3, num_decoder_layers=3)


def saved_adapter(backbone: Backbone, folder: Path, peft_type: str) -> Any:
    """PEFT's own folder with random weights. Its default head size is ``d_model / heads``: a T5 may need another."""
    decoder = backbone.spec.sites["decoder"]
    shared = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": LENGTH}
    shared["token_dim"] = decoder.kv_heads * decoder.head_dim
    config = PrefixTuningConfig(**shared) if peft_type == "PREFIX_TUNING" else CartridgeConfig(**shared)
    torch.manual_seed(1)
    model = get_peft_model(tiny_copy(backbone), config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    model.eval().save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_copy(backbone), folder).double().eval()


def tiny_copy(backbone: Backbone) -> Any:
    """The backbone's model for PEFT, which changes what it is given, with the exact norms."""
    made = type(backbone.model).from_pretrained(backbone.name, dtype=torch.float64)
    for name, module in backbone.model.named_modules():
        if hasattr(module, "variance_epsilon"):
            twin = made.get_submodule(name)
            twin.forward = type(module.forward)(module.forward.__func__, twin)
    return made


def peft_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=torch.tensor([INPUT]), decoder_input_ids=torch.tensor([OUTPUT])
        ).logits[0]
    return logits


def our_logits(backbone: Backbone, prefix: Prefix) -> torch.Tensor:
    return reference_logits(backbone.model, INPUT, OUTPUT, *parts_of(prefix, torch.float64))


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
def test_an_imported_prefix_gives_pefts_logits_and_tokens(backbone: Backbone, tmp_path: Path, peft_type: str) -> None:
    model = saved_adapter(backbone, tmp_path / "adapter", peft_type)
    prefix = import_peft(tmp_path / "adapter", backbone.spec)
    assert {site: sited.positions for site, sited in prefix.spec.sites.items()} == {"decoder": "shifted"}
    expected = peft_logits(model)
    torch.testing.assert_close(our_logits(backbone, prefix), expected, atol=1e-10, rtol=0)
    tensors, counted = parts_of(prefix, torch.float64)
    for others in ({}, tensors):  # without the prefix, and without its positions: both are others
        positions = dict.fromkeys(counted, "unshifted")
        assert (reference_logits(backbone.model, INPUT, OUTPUT, others, positions) - expected).abs().max() > 1e-2
    with torch.inference_mode():
        tokens = model.generate(input_ids=torch.tensor([INPUT]), do_sample=False, max_new_tokens=8)[0, 1:].tolist()
    [(ours, _)] = reference_generate(backbone, INPUT, tensors, counted, SamplingParams(max_new_tokens=8))
    assert ours == tokens


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
def test_peft_computes_the_same_with_an_exported_prefix(backbone: Backbone, tmp_path: Path, peft_type: Any) -> None:
    prefix = random_bart_prefix(backbone.spec, ["decoder"], LENGTH, "shifted", seed=3, dtype=torch.float64)
    export_peft(prefix, tmp_path / "adapter", backbone.spec, peft_type=peft_type, base_model="x", num_frozen_tokens=1)
    model = PeftModel.from_pretrained(tiny_copy(backbone), tmp_path / "adapter").double().eval()
    torch.testing.assert_close(peft_logits(model), our_logits(backbone, prefix), atol=1e-10, rtol=0)
    again = import_peft(tmp_path / "adapter", backbone.spec)
    assert all(torch.equal(again.tensors[name], prefix.tensors[name]) for name in prefix.tensors)


def test_what_peft_cannot_hold_is_not_exported(backbone: Backbone, tmp_path: Path) -> None:
    for sites, positions, message in (
        (["encoder"], "shifted", "the decoder alone"), (["decoder"], "unshifted", "expected shifted positions"),
    ):  # fmt: skip
        prefix: Any = random_bart_prefix(backbone.spec, sites, 3, positions)  # type: ignore[arg-type]
        with pytest.raises(InvalidArtifact, match=message):
            export_peft(prefix, tmp_path / "adapter", backbone.spec)
