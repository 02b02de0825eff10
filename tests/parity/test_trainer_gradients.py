"""Loss and gradient of a prefix through our modules equal transformers' and PEFT's, in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from prefixes.backbone import Backbone
from tests.support.llama import KINDS
from tests.support.trainer import padded, tiny_backbone, tiny_model, toy_examples, toy_plan
from trainer.data.sequences import Batch, TokenExample, collate
from trainer.training.config import Reduction, TrainConfig
from trainer.training.loss import batch_loss, denominator
from trainer.training.reparam import DirectPrefix
from trainer.training.words import word_activations

LENGTH = 5


@pytest.fixture(scope="module", params=["gpt2", *KINDS])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), family=request.param)


def make_batch(backbone: Backbone) -> tuple[list[TokenExample], Batch]:
    """Sequences of different lengths, so that padding would show."""
    examples = sorted(toy_examples(backbone), key=lambda example: len(example.ids))
    chosen = [examples[0], examples[-1], examples[5], examples[-2]]
    assert len({len(example.ids) for example in chosen}) > 1
    return chosen, collate(chosen)


def make_prefix(backbone: Backbone) -> DirectPrefix:
    torch.manual_seed(3)
    prefix = DirectPrefix(backbone.spec.sites, LENGTH).double()
    for parameter in prefix.parameters():
        torch.nn.init.normal_(parameter)
    return prefix


def reference_loss(logits: Tensor, examples: list[TokenExample], reduction: Reduction) -> Tensor:
    """The paper's loss written out, one sequence after the other; ``logits`` are (batch, length, vocab)."""
    per_token = [
        functional.cross_entropy(logits[row, at - 1], torch.tensor(example.ids[at]))
        for row, example in enumerate(examples)
        for at in range(example.start, len(example.ids))
    ]
    total = torch.stack(per_token).sum()
    return total / (len(per_token) if reduction == "token" else len(examples))


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_loss_and_gradient_equal_transformers_with_the_prefix_as_past(backbone: Backbone, reduction: Reduction) -> None:
    examples, batch = make_batch(backbone)
    ours = make_prefix(backbone)
    plan = toy_plan(backbone, TrainConfig(prefix_length=LENGTH))
    loss = batch_loss(tiny_model(backbone), batch, ours(), plan) / denominator(examples, reduction)
    loss.backward()

    theirs = make_prefix(backbone)
    key, value = theirs()["decoder"]
    cache = DynamicCache()
    ids, real = padded(batch.read)
    rows, length = ids.shape
    for layer in range(key.shape[0]):
        pair = (x[layer].transpose(0, 1).expand(rows, -1, -1, -1) for x in (key, value))
        cache.update(*pair, layer)
    mask = torch.cat([torch.ones(rows, LENGTH, dtype=torch.long), real.long()], dim=1)
    positions = torch.arange(LENGTH, LENGTH + length).expand(rows, -1)
    logits = backbone.model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits
    expected = reference_loss(logits, examples, reduction)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None and mine.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", *KINDS])
def test_loss_and_gradient_equal_peft_prefix_tuning(tmp_path: Path, family: str) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    backbone = tiny_backbone(tmp_path, family=family)
    examples, batch = make_batch(backbone)
    ours = make_prefix(backbone)
    plan = toy_plan(backbone, TrainConfig(prefix_length=LENGTH))
    loss = batch_loss(tiny_model(backbone), batch, ours(), plan) / denominator(examples, "sequence")
    loss.backward()

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=False)
    peft: Any = get_peft_model(backbone.model, config).double()
    key, value = (x.detach() for x in ours()["decoder"])
    # PEFT's one tensor: (P, layers * 2 * heads * head_dim), keys and values taking turns per layer.
    flat = torch.stack([key, value], dim=1).permute(2, 0, 1, 3, 4).reshape(LENGTH, -1)
    weight = peft.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(flat)
    ids, real = padded(batch.read)
    rows, length = ids.shape
    positions = torch.arange(length).expand(rows, -1)  # PEFT adds the prefix's length itself
    logits = peft(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits
    expected = reference_loss(logits, examples, "sequence")
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    layers, _, heads, dim = key.shape
    gradient = weight.grad.view(LENGTH, layers, 2, heads, dim).permute(2, 1, 0, 3, 4)
    for part, name in enumerate(("decoder_key", "decoder_value")):
        torch.testing.assert_close(ours.trained[name].grad, gradient[part], rtol=1e-9, atol=1e-12)


def test_word_activations_equal_transformers_cache_over_the_words(backbone: Backbone) -> None:
    words = "Blue Spice :"
    tokens = backbone.prompt_encoder.encode_text(words)
    repeated = (tokens * 9)[:9]
    key, value = word_activations(tiny_model(backbone), backbone, words, 9, ["decoder"])["decoder"]
    cache = backbone.model(torch.tensor([repeated]), use_cache=True).past_key_values
    for layer in range(key.shape[0]):
        torch.testing.assert_close(key[layer].transpose(0, 1), cache.layers[layer].keys[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(value[layer].transpose(0, 1), cache.layers[layer].values[0], rtol=1e-11, atol=1e-12)
