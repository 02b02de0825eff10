"""Loss and gradient of a prefix at any of BART's sites equal a plain reference's, in fp64, which knows no batch, no
padding and no cache. Words' activations equal transformers' own.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from prefixes.spec import SITES, Positions, PrefixSpec, Site
from tests.support.bart_reference import reference_logits
from tests.support.trainer import (
    tiny_backbone,
    tiny_model,
    toy_examples,
    toy_plan,
    toy_trainer,
    transformers_loss,
)
from trainer.data.sequences import Batch, TokenExample, collate
from trainer.training.config import Reduction, TrainConfig
from trainer.training.loss import batch_loss, denominator
from trainer.training.reparam import MlpPrefix
from trainer.training.words import word_activations

LENGTH = 5
SUBSETS = [subset for count in (1, 2, 3) for subset in itertools.combinations(SITES, count)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), family="bart")


def make_batch(backbone: Backbone) -> tuple[list[TokenExample], Batch]:
    """Inputs and targets of different lengths, the longest of both apart, so that padding would show in each."""
    examples = sorted(toy_examples(backbone), key=lambda one: one.size)
    long = TokenExample(examples[0].ids, 1, (*examples[0].input_ids, *examples[1].input_ids))
    wordy = TokenExample((2, 0, *range(40, 52), 2), 1, (0,))
    chosen = [examples[0], long, examples[-1], wordy]
    assert len({len(one.input_ids) for one in chosen}) > 2 and len({len(one.ids) for one in chosen}) > 2
    return chosen, collate(chosen)


def make_prefix(backbone: Backbone, plan: PrefixSpec, seed: int) -> MlpPrefix:
    torch.manual_seed(seed)
    sites = {site: planned.geometry for site, planned in plan.sites.items()}
    prefix = MlpPrefix(sites, LENGTH, middle=8).double()
    for parameter in prefix.parameters():
        torch.nn.init.normal_(parameter)
    return prefix


def reference_loss(
    backbone: Backbone, plan: PrefixSpec, examples: list[TokenExample], prefix: Any, reduction: Reduction
) -> Tensor:
    """One sequence after the other, by the reference."""
    positions = {site: planned.positions for site, planned in plan.sites.items()}
    losses = []
    for example in examples:
        logits = reference_logits(backbone.model, list(example.input_ids), list(example.ids), prefix, positions)
        losses += [
            functional.cross_entropy(logits[at - 1], torch.tensor(example.ids[at]))
            for at in range(example.start, len(example.ids))
        ]
    return torch.stack(losses).sum() / (len(losses) if reduction == "token" else len(examples))


@pytest.mark.parametrize("sites", SUBSETS, ids="+".join)
@pytest.mark.parametrize("positions", ["unshifted", "shifted"])
def test_loss_and_gradient_equal_the_plain_references(
    backbone: Backbone, sites: tuple[Site, ...], positions: Positions
) -> None:
    plan = toy_plan(backbone, TrainConfig(prefix_length=LENGTH, sites=sites, positions=positions))
    assert {site: planned.positions for site, planned in plan.sites.items()} == {
        site: "unshifted" if site == "cross" else positions for site in sites
    }
    reduction: Reduction = "token" if positions == "unshifted" else "sequence"
    examples, batch = make_batch(backbone)
    ours, theirs = (make_prefix(backbone, plan, len(sites)) for _ in range(2))
    loss = batch_loss(tiny_model(backbone), batch, ours(), plan) / denominator(examples, reduction)
    loss.backward()
    expected = reference_loss(backbone, plan, examples, theirs(), reduction)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None and mine.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_without_a_prefix_the_loss_is_transformers_own(backbone: Backbone) -> None:
    examples, batch = make_batch(backbone)
    loss = batch_loss(tiny_model(backbone), batch, {}, None) / denominator(examples, "token")
    torch.testing.assert_close(loss, transformers_loss(backbone, examples, batch), rtol=1e-12, atol=1e-12)


def test_word_activations_equal_transformers_at_every_site(backbone: Backbone) -> None:
    """They stand between ``<s>`` and ``</s>`` in the encoder, behind ``</s><s>`` in the decoder; only they are kept."""
    words, length = "Blue Spice :", 9
    tokens = (backbone.prompt_encoder.encode_text(words) * length)[:length]
    made = word_activations(tiny_model(backbone), backbone, words, length, SITES)

    encoder_keys: list[Tensor] = []
    layers = backbone.model.model.encoder.layers
    hooks = [x.self_attn.k_proj.register_forward_hook(lambda *a: encoder_keys.append(a[2])) for x in layers]
    with torch.no_grad():
        ids = torch.tensor([[0, *tokens, 2]])
        cache = backbone.model(ids, decoder_input_ids=torch.tensor([[2, 0, *tokens]]), use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    for layer, keys in enumerate(encoder_keys):
        expected = keys[0, 1 : 1 + length].view(length, *made["encoder"][0].shape[2:])
        torch.testing.assert_close(made["encoder"][0][layer], expected, rtol=1e-11, atol=1e-12)
    kept: tuple[tuple[Site, Any, int], ...] = (
        ("decoder", cache.self_attention_cache, 2),
        ("cross", cache.cross_attention_cache, 1),
    )
    for site, its_cache, start in kept:
        for layer, (key, value) in enumerate(zip(*made[site], strict=True)):
            for got, theirs in ((key, its_cache.layers[layer].keys), (value, its_cache.layers[layer].values)):
                expected = theirs[0, :, start : start + length].transpose(0, 1)
                torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_word_activations_are_given_for_the_sites_asked_for_alone(backbone: Backbone) -> None:
    made = word_activations(tiny_model(backbone), backbone, "Blue", 4, ["cross"])
    assert list(made) == ["cross"]
    geometry = backbone.spec.sites["cross"]
    assert made["cross"][1].shape == (geometry.layers, 4, geometry.kv_heads, geometry.head_dim)


@pytest.mark.parametrize(("words", "length", "said"), [("", 4, "at least one token"), ("Blue", 63, "at most 62")])
def test_words_that_give_no_prefix_are_refused(backbone: Backbone, words: str, length: int, said: str) -> None:
    with pytest.raises(InvalidParameter, match=said):
        word_activations(tiny_model(backbone), backbone, words, length, SITES)


def test_a_prefix_starts_from_the_words_at_every_site(backbone: Backbone) -> None:
    config = TrainConfig(prefix_length=3, method="direct", init="Blue Spice", epochs=1, learning_rate=1e-9)
    trained = toy_trainer(backbone, config).run()
    wanted = word_activations(tiny_model(backbone), backbone, "Blue Spice", 3, SITES)
    for site in SITES:
        for got, want in zip(trained[site], wanted[site], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
