"""Loss and gradient of a prefix at any of T5's sites equal a plain reference's, and PEFT's, in fp64. The learnt tokens
are those that transformers' own labels have, and words' activations are its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

from prefixes.backbone import Backbone
from prefixes.spec import SITES, Positions, PrefixSpec, Site
from tests.support.t5 import KINDS
from tests.support.t5_reference import reference_logits
from tests.support.trainer import (
    tiny_backbone,
    tiny_model,
    toy_data,
    toy_examples,
    toy_plan,
    toy_trainer,
    transformers_loss,
)
from trainer.data.sequences import Batch, TokenExample, collate
from trainer.training.config import TrainConfig
from trainer.training.loss import batch_loss, denominator
from trainer.training.reparam import DirectPrefix
from trainer.training.words import word_activations

LENGTH = 5


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), family=request.param)


def make_batch(backbone: Backbone) -> tuple[list[TokenExample], Batch]:
    """Inputs and targets of different lengths, so that padding would show in each; some longer than the bias reaches.
    """
    examples = sorted(toy_examples(backbone), key=lambda one: one.size)
    long = TokenExample(examples[0].ids, 1, (*range(3, 60), *examples[1].input_ids))
    wordy = TokenExample((0, *range(40, 90), 1), 1, (7, 1))
    chosen = [examples[0], long, examples[-1], wordy]
    assert len({len(one.input_ids) for one in chosen}) > 2 and len({len(one.ids) for one in chosen}) > 2
    return chosen, collate(chosen)


def make_prefix(backbone: Backbone, plan: PrefixSpec) -> DirectPrefix:
    torch.manual_seed(3)
    prefix = DirectPrefix({site: planned.geometry for site, planned in plan.sites.items()}, LENGTH).double()
    for parameter in prefix.parameters():
        torch.nn.init.normal_(parameter)
    return prefix


def losses(logits: Tensor, example: TokenExample) -> Tensor:
    """Of the learnt tokens; ``logits (length, vocab)`` are behind each of the example's."""
    return functional.cross_entropy(
        logits[example.start - 1 : len(example.ids) - 1], torch.tensor(example.ids[example.start :]), reduction="sum"
    )


@pytest.mark.parametrize("sites", [("decoder",), ("encoder",), ("cross",), SITES], ids="+".join)
@pytest.mark.parametrize("positions", ["unshifted", "shifted"])
def test_loss_and_gradient_equal_the_plain_references(
    backbone: Backbone, sites: tuple[Site, ...], positions: Positions
) -> None:
    plan = toy_plan(backbone, TrainConfig(prefix_length=LENGTH, sites=sites, positions=positions))
    examples, batch = make_batch(backbone)
    ours, theirs = make_prefix(backbone, plan), make_prefix(backbone, plan)
    loss = batch_loss(tiny_model(backbone), batch, ours(), plan) / denominator(examples, "sequence")
    loss.backward()
    counted = {site: planned.positions for site, planned in plan.sites.items()}
    expected = torch.stack([
        losses(reference_logits(backbone.model, list(one.input_ids), list(one.ids), theirs(), counted), one)
        for one in examples
    ]).sum() / len(examples)  # fmt: skip
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None and mine.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-11)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_inputs_and_labels_are_those_of_transformers(backbone: Backbone) -> None:
    """From texts: an input and a target end with the end token, and the decoder begins with the start token."""
    tokenizer, plan = backbone.tokenizer, toy_plan(backbone, TrainConfig(prefix_length=LENGTH))
    for example, made in zip(toy_data().examples, toy_examples(backbone), strict=True):
        assert list(made.input_ids) == tokenizer(plan.template.format(input=example.input)).input_ids
        labels = torch.tensor([tokenizer(text_target=example.target).input_ids])
        start = torch.tensor([[backbone.decoder_prompt[0]]])
        assert list(made.ids) == torch.cat([start, labels], dim=1)[0].tolist() and made.start == 1


def test_without_a_prefix_the_loss_is_transformers_own(backbone: Backbone) -> None:
    examples, batch = make_batch(backbone)
    loss = batch_loss(tiny_model(backbone), batch, {}, None) / denominator(examples, "token")
    torch.testing.assert_close(loss, transformers_loss(backbone, examples, batch), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_peft_prefix_tuning(tmp_path: Path, kind: str) -> None:
    """At the decoder, which is all that PEFT trains, behind shifted positions, which are transformers'."""
    backbone = tiny_backbone(tmp_path, family=kind)
    config = TrainConfig(prefix_length=LENGTH, sites=("decoder",), positions="shifted")
    plan = toy_plan(backbone, config)
    [example, *_], _ = make_batch(backbone)
    ours = make_prefix(backbone, plan)
    loss = batch_loss(tiny_model(backbone), collate([example]), ours(), plan)
    loss.backward()

    geometry = backbone.spec.sites["decoder"]
    trained = geometry.layers | 1  # of an odd number each decoder layer takes one of its own: 2i mod L
    peft: Any = get_peft_model(backbone.model, PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, num_layers=trained,
        token_dim=geometry.kv_heads * geometry.head_dim,
    )).double()  # fmt: skip
    weight = peft.prompt_encoder["default"].embedding.weight
    shape = (LENGTH, trained, 2, geometry.kv_heads, geometry.head_dim)
    taken = [2 * layer % trained for layer in range(geometry.layers)]
    pairs = torch.stack([x.detach() for x in ours()["decoder"]], dim=2)  # (layers, P, 2, heads, head_dim)
    with torch.no_grad():
        weight.view(shape)[:, taken] = pairs.transpose(0, 1)
    logits = peft(
        input_ids=torch.tensor([example.input_ids]), decoder_input_ids=torch.tensor([example.ids[:-1]])
    ).logits[0]
    expected = losses(logits, example)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    for part, name in enumerate(("decoder_key", "decoder_value")):
        theirs = weight.grad.view(shape)[:, taken, part].transpose(0, 1)
        torch.testing.assert_close(ours.trained[name].grad, theirs, rtol=1e-8, atol=1e-11)


def test_word_activations_equal_transformers_at_every_site(backbone: Backbone) -> None:
    """They stand before ``</s>`` in the encoder, behind the start token in the decoder; only they are kept."""
    words, length = "Blue Spice :", 9
    tokens = (backbone.prompt_encoder.encode_text(words) * length)[:length]
    made = word_activations(tiny_model(backbone), backbone, words, length, SITES)
    decoder, encoder = backbone.model.decoder.block, backbone.model.encoder.block
    attentions: dict[Site, list[Any]] = {
        "encoder": [block.layer[0].SelfAttention for block in encoder],
        "decoder": [block.layer[0].SelfAttention for block in decoder],
        "cross": [block.layer[1].EncDecAttention for block in decoder],
    }
    caught: dict[Any, Tensor] = {}
    modules = [getattr(one, part) for site in SITES for one in attentions[site] for part in "kv"]
    hooks = [m.register_forward_hook(lambda m, _, out: caught.__setitem__(m, out[0])) for m in modules]
    with torch.no_grad():
        backbone.model(torch.tensor([[*tokens, 1]]), decoder_input_ids=torch.tensor([[0, *tokens]]))
    for hook in hooks:
        hook.remove()
    for site in SITES:
        start = 1 if site == "decoder" else 0
        for layer, attention in enumerate(attentions[site]):
            for part, got in zip("kv", made[site], strict=True):
                theirs = caught[getattr(attention, part)][start : start + length].view(got[layer].shape)
                torch.testing.assert_close(got[layer], theirs, rtol=1e-10, atol=1e-11)


def test_a_prefix_learns(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32, "t5 v1.1")
    trainer = toy_trainer(backbone, TrainConfig(prefix_length=4, method="direct", epochs=6, learning_rate=0.05))
    trained = trainer.run()
    assert set(trained) == set(SITES)
    examples, plan = toy_examples(backbone), toy_plan(backbone, TrainConfig(prefix_length=4))
    batch, model = collate(examples), tiny_model(backbone)
    bare = batch_loss(model, batch, {}, None)
    assert batch_loss(model, batch, trained, plan) < 0.85 * bare
