"""Scores, and the generation they are taken from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefixes.errors import IncompatiblePrefix, InvalidParameter
from server.engine.types import SamplingParams
from tests.support.prefixes import make_prefix
from tests.support.trainer import TEMPLATE, tiny_backbone, tiny_model, toy_pairs, toy_trainer
from trainer.config import TrainConfig
from trainer.data import Dataset, Example, TokenExample, collate
from trainer.evaluate import field_scores, generate, references, score
from trainer.export import fold
from trainer.loop import forward_logits


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
    with pytest.raises(InvalidParameter, match="expected bleu or fields"):
        score("meteor", ["a"], [["a"]])


def test_references_are_grouped_by_input_in_order() -> None:
    data = Dataset((Example(1, "b", "x"), Example(2, "a", "y"), Example(3, "b", "z")), "sha256:0")
    assert list(references(data).items()) == [("b", ["x", "z"]), ("a", ["y"])]


def test_the_serving_engine_computes_what_the_loop_trained(tmp_path: Path) -> None:
    """Greedy tokens out of the engine are the arg max of the training forward over the same tokens."""
    backbone = tiny_backbone(tmp_path)
    config = TrainConfig(prefix_length=5, method="direct", epochs=3, batch_size=6, learning_rate=0.05, seed=2)
    kv = toy_trainer(backbone, config).run()
    prefix = fold(kv, backbone, template=TEMPLATE, defaults={}, origin={})
    inputs = [pair["input"] for pair in toy_pairs()[:6]]
    outputs = generate(backbone, prefix, inputs, SamplingParams(max_new_tokens=12))
    examples = []
    for text, output in zip(inputs, outputs, strict=True):
        prompt = backbone.prompt_encoder.encode(TEMPLATE, text)
        examples.append(TokenExample((*prompt, *output.token_ids), len(prompt)))
    batch = collate(examples, backbone.pad_token_id)
    logits = forward_logits(tiny_model(backbone), batch, kv, offset=5)
    assert len(batch.targets) > 20
    assert torch.equal(logits.argmax(-1), batch.targets)
    bare = forward_logits(tiny_model(backbone), batch, {}, offset=0)
    assert not torch.equal(bare.argmax(-1), batch.targets), "the prefix decides"


def test_a_prefix_of_another_backbone_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path)
    with pytest.raises(IncompatiblePrefix):
        generate(backbone, make_prefix(), ["a"], SamplingParams())
