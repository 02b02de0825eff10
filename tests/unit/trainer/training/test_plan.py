"""The plan of a prefix: which sites, how positions count, what is refused before anything is read or trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import IncompatiblePrefix, InvalidArtifact, InvalidParameter
from prefixes.spec import SITES
from tests.support.prefixes import save_tiny_gpt2
from tests.support.trainer import FAMILIES, tiny_backbone
from trainer.training.config import TrainConfig
from trainer.training.plan import plan_prefix, usual_template


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    return {name: tiny_backbone(tmp_path_factory.mktemp(name), torch.float32, name) for name in FAMILIES}


def test_without_a_choice_every_site_of_the_backbone_gets_a_prefix(backbones: dict[str, Backbone]) -> None:
    assert list(plan_prefix(TrainConfig(), backbones["gpt2"]).sites) == ["decoder"]
    plan = plan_prefix(TrainConfig(prefix_length=7), backbones["bart"])
    assert set(plan.sites) == set(SITES)
    for site, planned in plan.sites.items():
        assert (planned.length, planned.dtype) == (7, "float32")
        assert planned.geometry == backbones["bart"].spec.sites[site]


def test_positions_are_the_papers_unless_chosen_and_cross_attention_never_shifts(
    backbones: dict[str, Backbone],
) -> None:
    def positions(family: str, config: TrainConfig) -> dict[str, str]:
        return {site: planned.positions for site, planned in plan_prefix(config, backbones[family]).sites.items()}

    assert positions("gpt2", TrainConfig()) == {"decoder": "shifted"}
    assert positions("gpt2", TrainConfig(positions="unshifted")) == {"decoder": "unshifted"}
    assert positions("bart", TrainConfig()) == dict.fromkeys(SITES, "unshifted")
    shifted = {"decoder": "shifted", "encoder": "shifted", "cross": "unshifted"}
    assert positions("bart", TrainConfig(positions="shifted")) == shifted


def test_sites_have_one_order_however_they_are_asked_for() -> None:
    assert TrainConfig(sites=("cross", "encoder", "cross")) == TrainConfig(sites=("encoder", "cross"))
    config = TrainConfig(sites=("cross",), positions="shifted")
    assert TrainConfig(**config.as_dict()) == config, "what a resumed run compares"


def test_sites_and_lengths_that_the_backbone_does_not_have_are_refused(backbones: dict[str, Backbone]) -> None:
    with pytest.raises(InvalidParameter, match="this backbone has decoder, got 'encoder'"):
        plan_prefix(TrainConfig(sites=("decoder", "encoder")), backbones["gpt2"])
    with pytest.raises(IncompatiblePrefix, match="expected less than the window of 64, got 64"):
        plan_prefix(TrainConfig(prefix_length=64), backbones["gpt2"])
    plan_prefix(TrainConfig(prefix_length=200), backbones["bart"])  # unshifted: takes nothing of the window
    with pytest.raises(InvalidArtifact, match="exactly one"):
        plan_prefix(TrainConfig(), backbones["bart"], "no slot")


def test_a_decoder_without_gpt2s_mark_has_a_line_break_between_input_and_output(tmp_path: Path) -> None:
    """Another family knows ``<|endoftext|>`` as the border of documents, or not at all."""
    assert usual_template(tiny_backbone(tmp_path / "llama", torch.float32, "llama")) == "{input}\n"
    save_tiny_gpt2(tmp_path / "gpt2")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab={"a": 0, "\n": 1, "<end>": 2}, merges=[])), eos_token="<end>"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert usual_template(load_backbone(str(tmp_path / "gpt2"))) == "{input}\n"


def test_a_template_with_another_models_marks_is_refused(backbones: dict[str, Backbone]) -> None:
    with pytest.raises(InvalidParameter, match=r"got <\|im_end\|>, which it takes for plain text"):
        plan_prefix(TrainConfig(), backbones["gpt2"], "{input}<|im_end|>\n")
    plan_prefix(TrainConfig(), backbones["gpt2"], "{input}<|endoftext|>")


def test_a_prefix_under_a_half_precision_model_is_trained_in_float32(tmp_path: Path) -> None:
    FAMILIES["bart"](tmp_path)
    half = load_backbone(str(tmp_path), dtype=torch.bfloat16)
    assert {planned.dtype for planned in plan_prefix(TrainConfig(), half).sites.values()} == {"float32"}
