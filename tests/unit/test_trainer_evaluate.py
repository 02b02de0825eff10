"""Scores, and the generation they are taken from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefixes.backbone import Backbone
from prefixes.errors import IncompatiblePrefix, InputTooLong, InvalidParameter
from prefixes.spec import PrefixSpec
from server.engine.types import Output, SamplingParams
from server.parameters import merge_parameters
from server.settings import Settings
from tests.support.prefixes import make_prefix
from tests.support.trainer import FAMILIES, tiny_backbone, tiny_model, toy_pairs, toy_plan, toy_trainer
from trainer.config import TrainConfig
from trainer.data import Dataset, Example
from trainer.evaluate import LIMITS, decoding, field_scores, generate, references, score
from trainer.export import fold
from trainer.forward import forward_logits
from trainer.rouge import rouge
from trainer.sequences import TokenExample, collate


def test_field_scores_count_exact_parts_against_the_best_reference() -> None:
    outputs = ["name : A | food : B", "name : C", ""]
    expected = [["name : A | food : X | area : Y"], ["name : D", "name : C"], ["name : E"]]
    scores = field_scores(outputs, expected)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(2 / 5)
    assert scores["f1"] == pytest.approx(0.5)
    assert scores["exact"] == pytest.approx(1 / 3)


def test_bleu_takes_the_best_of_several_references_of_unequal_number() -> None:
    pytest.importorskip("sacrebleu")
    text = "Blue Spice is a coffee shop in the city centre."
    assert score("bleu", [text, text], [["No such thing here at all.", text], [text]])["bleu"] == pytest.approx(100.0)
    assert score("bleu", [text], [["No such thing here at all."]])["bleu"] < 10


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="expected bleu or rouge or fields"):
        score("meteor", ["a"], [["a"]])


def test_references_are_grouped_by_input_in_order() -> None:
    data = Dataset((Example(1, "b", "x"), Example(2, "a", "y"), Example(3, "b", "z")), "sha256:0")
    assert list(references(data).items()) == [("b", ["x", "z"]), ("a", ["y"])]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_serving_engine_computes_what_the_loop_trained(tmp_path: Path, family: str) -> None:
    """Greedy tokens out of the engine are the arg max of the training forward over the same tokens."""
    backbone = tiny_backbone(tmp_path, family=family)
    config = TrainConfig(prefix_length=5, method="direct", epochs=3, batch_size=6, learning_rate=0.05, seed=2)
    kv, plan = toy_trainer(backbone, config).run(), toy_plan(backbone, config)
    prefix = fold(kv, plan, {})
    inputs = [pair["input"] for pair in toy_pairs()[:6]]
    outputs = generate(backbone, prefix, inputs, SamplingParams(max_new_tokens=12))
    batch = collate([following(backbone, plan, *pair) for pair in zip(inputs, outputs, strict=True)], 1)
    logits = forward_logits(tiny_model(backbone), batch, kv, plan)
    assert len(batch.targets) > 20
    free = batch.targets != backbone.forced_last  # which may be forced where an output reaches its limit
    assert torch.equal(logits.argmax(-1)[free], batch.targets[free])
    bare = forward_logits(tiny_model(backbone), batch, {}, None)
    assert not torch.equal(bare.argmax(-1)[free], batch.targets[free]), "the prefix decides"


def following(backbone: Backbone, plan: PrefixSpec, text: str, output: Output) -> TokenExample:
    """The sequences in which the engine made ``output``."""
    prompt = tuple(backbone.prompt_encoder.encode(plan.template, text))
    if backbone.spec.input_site == "encoder":
        return TokenExample((*backbone.decoder_prompt, *output.token_ids), len(backbone.decoder_prompt), prompt)
    return TokenExample((*prompt, *output.token_ids), len(prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_input_is_refused_or_cut(tmp_path: Path, family: str) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32, family)
    config = TrainConfig(prefix_length=3, method="direct", epochs=1)
    prefix = fold(toy_trainer(backbone, config).run(), toy_plan(backbone, config), {})
    params, long = SamplingParams(max_new_tokens=1), "\x01" * 100
    with pytest.raises(InputTooLong, match="--truncate cuts it"):
        generate(backbone, prefix, [long], params)
    cut = generate(backbone, prefix, [long], params, truncate=True)
    assert len(cut[0].token_ids) == 1


def test_scores_decode_as_the_artifact_says_unless_told_otherwise(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32, "bart")
    backbone = replace(backbone, generation_defaults={"min_new_tokens": 55, "do_sample": True, "num_beams": 4})
    prefix = make_prefix(backbone.spec, defaults={"length_penalty": 0.8, "max_new_tokens": 9, "truncate": True})
    params, truncate = decoding(backbone, prefix, {"num_beams": 2})
    assert (params.num_beams, params.length_penalty, params.max_new_tokens, truncate) == (2, 0.8, 9, True)
    assert (params.min_new_tokens, params.do_sample) == (9, False), "as the server lowers it; scores never sample"
    with pytest.raises(InvalidParameter, match="min_new_tokens"):
        decoding(backbone, prefix, {"min_new_tokens": 20})


def test_a_default_that_drops_beams_in_the_server_drops_them_in_a_score(tmp_path: Path) -> None:
    """A stop text and beams exclude each other: the artifact's word on one drops the backbone's on the other."""
    backbone = replace(tiny_backbone(tmp_path, torch.float32), generation_defaults={"num_beams": 4, "top_k": 50})
    prefix = make_prefix(backbone.spec, defaults={"stop": ["\n"]})
    served, _ = merge_parameters({}, prefix.spec.defaults, backbone.generation_defaults, LIMITS)
    params, truncate = decoding(backbone, prefix, {})
    assert (params, truncate) == (served, False)
    assert (params.num_beams, params.stop, params.do_sample) == (1, ("\n",), False)
    assert decoding(backbone, prefix, {"num_beams": 3})[0].stop == (), "a request for beams drops the stop text"


def test_a_prefix_that_samples_when_served_is_scored_without_unless_asked(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32)
    prefix = make_prefix(backbone.spec, defaults={"temperature": 0.7})
    assert decoding(backbone, prefix, {})[0] == SamplingParams(max_new_tokens=128)
    assert decoding(backbone, prefix, {"do_sample": True})[0].temperature == 0.7


def test_the_default_length_of_a_score_is_a_servers() -> None:
    assert LIMITS.default_max_new_tokens == Settings.model_fields["default_max_new_tokens"].default


def test_rouge_is_the_packages_f1_with_stemming() -> None:
    """By hand: `the models learn` against `a model learned fast`: 2 stems of 3 and of 4 in common, no bigram less."""
    pytest.importorskip("rouge_score")
    scores = rouge(["the models learn"], [["a model learned fast"]])
    assert scores["rouge1"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert scores["rouge2"] == pytest.approx(100 * 2 * 1 / (2 + 3))
    assert scores["rougeL"] == pytest.approx(100 * 2 * 2 / (3 + 4))


def test_rouge_takes_all_three_scores_from_the_reference_with_the_best_rouge_1() -> None:
    pytest.importorskip("rouge_score")
    one = "alpha beta gamma delta"
    scattered, ordered = "delta gamma beta alpha", "alpha beta something else"
    scores = score("rouge", [one], [[ordered, scattered]])
    assert scores["rouge1"] == pytest.approx(100.0)
    assert scores["rouge2"] == 0.0 and scores["rougeL"] == pytest.approx(25.0), "not the other reference's better ones"
    assert score("rouge", [one, ""], [[one], [one]])["rougeL"] == pytest.approx(50.0), "mean over outputs"


def test_a_prefix_of_another_backbone_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path)
    with pytest.raises(IncompatiblePrefix):
        generate(backbone, make_prefix(), ["a"], SamplingParams())
