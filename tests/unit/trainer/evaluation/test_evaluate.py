"""Scores, and the generation they are taken from."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from prefixes.backbone import Backbone
from prefixes.errors import IncompatiblePrefix, InputTooLong, InvalidParameter
from prefixes.spec import PrefixSpec
from server.engine.kernels import select_kernels
from server.engine.types import Output, SamplingParams
from server.parameters import WITHOUT_LIMITS, merge_parameters
from server.settings import Settings
from tests.support.gguf import tiny_gguf
from tests.support.prefixes import make_prefix
from tests.support.trainer import (
    FAMILIES,
    forward_logits,
    tiny_backbone,
    tiny_model,
    toy_pairs,
    toy_plan,
    toy_trainer,
)
from trainer.data.dataset import Dataset, Example
from trainer.data.sequences import TokenExample, collate
from trainer.evaluation import generate as generation
from trainer.evaluation.evaluate import Evaluation, evaluate, references
from trainer.evaluation.generate import decoding, generate
from trainer.evaluation.scores.presets import PRESETS
from trainer.training.config import TrainConfig
from trainer.training.export import fold


def dataset(*pairs: tuple[str, str]) -> Dataset:
    return Dataset(tuple(Example(line, *pair) for line, pair in enumerate(pairs, 1)), "sha256:" + "0" * 64)


def test_references_are_grouped_by_input_in_order() -> None:
    data = dataset(("b", "x"), ("a", "y"), ("b", "z"))
    assert list(references(data, PRESETS["plain"]).items()) == [("b", ["x", "z"]), ("a", ["y"])]
    assert list(references(data, PRESETS["plain"], limit=1)) == ["b"]


def test_e2es_references_are_grouped_by_meaning_whatever_the_order_of_the_fields() -> None:
    data = dataset(("name : A | food : B", "x"), ("name : C", "y"), ("food : B | name : A ", "z"))
    assert references(data, PRESETS["e2e"]) == {"name : A | food : B": ["x", "z"], "name : C": ["y"]}
    assert len(references(data, PRESETS["plain"])) == 3


def test_a_file_of_8_bits_is_scored_as_it_is_served_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    chosen = select_kernels

    def select(*args: Any, **given: Any) -> Any:
        asked.append(given["quantize"])
        return chosen(*args, **given)

    monkeypatch.setattr(generation, "select_kernels", select)
    backbone = tiny_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    prefix, data = make_prefix(backbone.spec, length=3), dataset(("a", "b"))
    assert evaluate(backbone, prefix, data, metrics=["bleu"], resamples=0).decoding["quantize"] == "int8"
    floats = evaluate(backbone, prefix, data, metrics=["bleu"], resamples=0, quantize="none")
    assert "quantize" not in floats.decoding
    generate(backbone, prefix, ["a"], SamplingParams(max_new_tokens=2))
    assert asked == ["int8", "none", "int8"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_serving_engine_computes_what_the_loop_trained(tmp_path: Path, family: str) -> None:
    """Greedy tokens out of the engine are the arg max of the training forward over the same tokens."""
    backbone = tiny_backbone(tmp_path, family=family)
    config = TrainConfig(prefix_length=5, method="direct", epochs=3, batch_size=6, learning_rate=0.05, seed=2)
    kv, plan = toy_trainer(backbone, config).run(), toy_plan(backbone, config)
    prefix = fold(kv, plan, {})
    inputs = [pair["input"] for pair in toy_pairs()[:6]]
    outputs = [made.output for made in generate(backbone, prefix, inputs, SamplingParams(max_new_tokens=12))]
    batch = collate([following(backbone, plan, *pair) for pair in zip(inputs, outputs, strict=True)])
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
    cut, whole = generate(backbone, prefix, [long, "short"], params, truncate=True)
    assert (len(cut.output.token_ids), cut.truncated, whole.truncated) == (1, True, False)


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
    served, _ = merge_parameters({}, prefix.spec.defaults, backbone.generation_defaults, WITHOUT_LIMITS)
    params, truncate = decoding(backbone, prefix, {})
    assert (params, truncate) == (served, False)
    assert (params.num_beams, params.stop, params.do_sample) == (1, ("\n",), False)
    assert decoding(backbone, prefix, {"num_beams": 3})[0].stop == (), "a request for beams drops the stop text"


def test_a_prefix_that_samples_when_served_is_scored_without_unless_asked(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32)
    prefix = make_prefix(backbone.spec, defaults={"temperature": 0.7})
    assert decoding(backbone, prefix, {})[0] == SamplingParams(max_new_tokens=128)
    assert decoding(backbone, prefix, {"do_sample": True})[0].temperature == 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_scores_every_input_against_all_its_references(tmp_path: Path, family: str) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32, family)
    prefix = make_prefix(backbone.spec, sites=tuple(backbone.spec.sites), template=backbone.input_template)
    inputs = ["one", "two", "three", "\x01" * 100]
    made = generate(backbone, prefix, inputs, SamplingParams(max_new_tokens=6, num_beams=2), truncate=True)
    perfect, first, *others = [one.output.text for one in made]
    data = dataset(
        ("one", "no such words"), ("one", perfect), ("two", first), *zip(inputs[2:], others, strict=True)
    )
    told: list[tuple[int, int]] = []
    found = evaluate(
        backbone, prefix, data, metrics=["chrf", "ter"], parameters={"max_new_tokens": 6, "num_beams": 2},
        truncate=True, resamples=50, report=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert (found.inputs, found.references, found.data) == (4, 5, data.digest)
    assert list(found.scores) == ["chrf", "ter"], "in the order asked for"
    assert found.scores["chrf"].value == pytest.approx(100.0, abs=1e-6)
    assert found.scores["chrf"].low == found.scores["chrf"].high == pytest.approx(100.0, abs=1e-6)
    assert (found.scores["ter"].value, found.ranked_by) == (0.0, "chrf")
    assert [row.output for row in found.outputs] == [one.output.text for one in made]
    assert [row.truncated for row in found.outputs] == [False, False, False, True]
    assert found.outputs[0].references == ("no such words", perfect)
    assert (found.decoding["num_beams"], found.decoding["max_new_tokens"], found.decoding["truncate"]) == (2, 6, True)
    assert told[-1] == (4, 4)


def test_an_evaluation_survives_json_and_its_summary_holds_no_text(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32)
    data = dataset(("a secret input", "a secret target"), ("b", "c"))
    made = evaluate(backbone, make_prefix(backbone.spec), data, parameters={"max_new_tokens": 3}, resamples=10)
    assert Evaluation.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    assert "secret" not in json.dumps(made.summary())
    record = made.record({"scores": {"final_loss": 1.5, "bleu": 99.0}, "seconds": 3})
    assert record["scores"]["final_loss"] == 1.5 and record["scores"]["bleu"] == made.scores["bleu"].value
    assert record.keys() == {"scores", "evaluation"} and record["evaluation"] == made.summary()
    with pytest.raises(InvalidParameter, match="expected its own JSON"):
        Evaluation.from_dict({"scores": {}, "outputs": [{}]})


def test_what_cannot_be_scored_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32)
    prefix, data = make_prefix(backbone.spec), dataset(("a", "b"))

    def fail(done: int, total: int) -> None:
        raise AssertionError("generated")

    for wrong, said in (
        ({"metrics": ["blue"]}, "metric: expected one of bleu, ter"),
        ({"preset": "e3e"}, "preset: expected one of plain, e2e"),
        ({"parameters": {"temperature": 0.5}}, "got temperature"),
    ):
        with pytest.raises(InvalidParameter, match=said):
            evaluate(backbone, prefix, data, report=fail, **wrong)


def test_whoever_watches_an_evaluation_can_end_it(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        evaluate(backbone, make_prefix(backbone.spec), dataset(("a", "b")), report=stop)
    assert threading.active_count() <= before + 2, "the engine was closed (the kernels' own threads may stay)"


def test_the_default_length_of_a_score_is_a_servers() -> None:
    assert WITHOUT_LIMITS.default_max_new_tokens == Settings.model_fields["default_max_new_tokens"].default


def test_a_prefix_of_another_backbone_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path)
    with pytest.raises(IncompatiblePrefix):
        generate(backbone, make_prefix(), ["a"], SamplingParams())
