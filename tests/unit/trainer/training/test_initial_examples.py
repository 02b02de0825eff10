"""A prefix from the task's own examples: which keys and values it starts from, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixes.artifact import read_prefix
from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from tests.support.bart import save_tiny_bart
from tests.support.llama import tiny_llama
from tests.support.prefixes import save_tiny_gpt2
from tests.support.trainer import (
    TEMPLATE,
    forward_logits,
    tiny_backbone,
    tiny_model,
    toy_examples,
    toy_pairs,
    toy_plan,
    toy_trainer,
    write_jsonl,
)
from trainer.data.sequences import TokenExample, collate
from trainer.training.config import TrainConfig
from trainer.training.initial import InitialExamples, InitialText
from trainer.training.reparam import PrefixKV
from trainer.training.request import RunRequest
from trainer.training.run import run_training

START = TrainConfig.of(
    "e2e", {"prefix_length": 30, "init": "examples", "epochs": 1, "learning_rate": 1e-12, "batch_size": 6}
)
DECODERS = ("gpt2", "llama", "yarn", "qwen3", "smollm3")


def backbone_of(folder: Path, family: str) -> Backbone:
    """Those of the Llama family begin every text with a token of their own."""
    if family in ("gpt2", "bart"):
        return tiny_backbone(folder, torch.float64, family)
    return tiny_llama(folder, family, begins=True)


def started(backbone: Backbone, config: TrainConfig = START) -> tuple[PrefixKV, list[TokenExample]]:
    """The prefix before its first step, and the pairs that it was made of."""
    trainer = toy_trainer(backbone, config)
    trainer._initialise()
    assert isinstance(trainer.initial, InitialExamples)
    return trainer._folded(), list(trainer.initial.pairs)


def cached(layers: Any) -> tuple[Tensor, Tensor]:
    """Keys and values ``(layers, tokens, heads, head_dim)`` of a cache of transformers'."""
    keys, values = (
        torch.stack([getattr(layer, part)[0].transpose(0, 1) for layer in layers]) for part in ("keys", "values")
    )
    return keys, values


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_it_is_transformers_keys_and_values_of_whole_pairs_one_behind_the_other(family: str, tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, family)
    made, pairs = started(backbone)
    texts = {f"{pair['input']}<|endoftext|>{pair['target']}<|endoftext|>" for pair in toy_pairs()}
    tokenizer = backbone.tokenizer  # its own post-processor adds the first token, where it has one
    known = {tuple(tokenizer(text).input_ids) for text in texts}
    assert {pair.ids for pair in pairs} <= known, "as the model would see them: first token, template, input and target"
    tokens = [token for pair in pairs for token in pair.ids]
    assert len(tokens) >= 30 > len(tokens) - len(pairs[-1].ids), "as many pairs as fill the prefix"
    expected = cached(backbone.model(torch.tensor([tokens[:30]]), use_cache=True).past_key_values.layers)
    for got, wanted in zip(made["decoder"], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # transformers rounds its rotations to float32


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_goes_on_exactly_as_behind_the_pairs(family: str, tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, family)
    made, pairs = started(backbone)
    plan, model, examples = toy_plan(backbone, START), tiny_model(backbone), toy_examples(backbone)[:4]
    got = forward_logits(model, collate(examples), made, plan)
    before = tuple(token for pair in pairs for token in pair.ids)[:30]
    behind = [TokenExample((*before, *example.ids), example.start + 30) for example in examples]
    expected = forward_logits(model, collate(behind), {}, None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_an_encoder_reads_the_inputs_and_its_decoder_the_targets_at_all_three_sites(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, "bart")
    made, pairs = started(backbone)
    inputs, outputs = (
        torch.tensor([[token for pair in pairs for token in getattr(pair, name)][:30]])
        for name in ("input_ids", "ids")
    )
    model = backbone.model.model
    encoded = model.encoder(inputs).last_hidden_state
    cache = model.decoder(outputs, encoder_hidden_states=encoded, use_cache=True).past_key_values
    expected = {
        "decoder": cached(cache.self_attention_cache.layers), "cross": cached(cache.cross_attention_cache.layers)
    }  # fmt: skip
    seen = [layer.self_attn for layer in model.encoder.layers]
    projected: list[tuple[Tensor, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda _, __, out: projected.append(out))
        for attention in seen for part in (attention.k_proj, attention.v_proj)
    ]  # fmt: skip
    model.encoder(inputs)
    for hook in hooks:
        hook.remove()
    heads = made["encoder"][0].shape[2:]
    expected["encoder"] = tuple(
        torch.stack([out[0].view(30, *heads) for out in projected[part::2]]) for part in (0, 1)
    )  # type: ignore[assignment]
    assert set(made) == {"encoder", "decoder", "cross"}
    for site, pair in made.items():
        for got, wanted in zip(pair, expected[site], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_the_seed_alone_draws_the_pairs(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, "gpt2")
    torch.manual_seed(5)
    (one, drawn), (again, _) = started(backbone), started(backbone)
    assert all(torch.equal(a, b) for a, b in zip(one["decoder"], again["decoder"], strict=True))
    other = started(backbone, TrainConfig(**{**START.as_dict(), "seed": 7}))[1]
    assert drawn != other


def test_too_few_tokens_are_repeated_and_nothing_passes_the_window(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, "gpt2")
    plan, model = toy_plan(backbone, START), tiny_model(backbone)
    examples = toy_examples(backbone, 1)
    initial = InitialExamples.draw(examples, plan, 1)
    assert initial.pairs == examples
    keys, _ = initial.activations(model, backbone, plan)["decoder"]
    repeated = (examples[0].ids * 3)[:30]
    assert len(examples[0].ids) < 30 == len(repeated)
    with torch.no_grad():
        expected = cached(backbone.model(torch.tensor([repeated]), use_cache=True).past_key_values.layers)[0]
    torch.testing.assert_close(keys, expected)
    bart = backbone_of(tmp_path / "bart", "bart")
    long = TrainConfig(**{**START.as_dict(), "prefix_length": bart.spec.max_positions + 1})
    with pytest.raises(InvalidParameter, match="init: expected a prefix of at most"):
        started(bart, long)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"method": "mlp"}, ("mlp", 0)), ({"frozen_positions": 0}, ("direct", 0)), ({}, ("direct", 1))],
)
def test_it_is_trained_as_from_a_text_unless_told_otherwise(options: dict[str, Any], expected: tuple[str, int]) -> None:
    config = TrainConfig.of("e2e", {**options, "init": "examples"})
    assert (config.method, config.frozen_positions) == expected


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_artifact_and_report_say_so(family: str, tmp_path: Path) -> None:
    (save_tiny_gpt2 if family == "gpt2" else save_tiny_bart)(tmp_path / "backbone")
    data = write_jsonl(tmp_path / "data.jsonl", toy_pairs(30))
    template = TEMPLATE if family == "gpt2" else None
    config = TrainConfig(**{**START.as_dict(), "prefix_length": 12})
    request = RunRequest(data, str(tmp_path / "backbone"), template, tmp_path / "out", config, hold_out=20)
    result = run_training(request)
    origin = read_prefix(result.artifact).spec.origin
    initial = origin["initial"]
    assert initial["kind"] == "examples" and initial["examples"] >= 1
    assert origin["hyperparameters"]["init"] == "examples"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["origin"]["initial"] == initial
    with pytest.raises(InvalidParameter, match="words or examples, or a text or version"):
        RunRequest(data, "x", template, tmp_path / "other", config, initial=InitialText("a text"))
