"""Our BART modules, through the dense path that training takes, equal the plain reference: every row of padded batches,
any subset of sites, in fp64.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixes.backbone import Backbone
from prefixes.spec import SITES, Positions, Site
from server.engine.kernels.dense import DenseAttention
from server.engine.kernels.torch_reference import TorchKernels
from server.engine.models import Model, load_model
from tests.support.bart import random_bart_prefix, tiny_bart
from tests.support.bart_reference import Parts, parts_of, reference_logits

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"activation_function": "gelu_new"},
    "scaled": {"scale_embedding": True, "layers": (3, 1), "activation_function": "relu"},
    "bias": {"logits_bias": True, "layers": (1, 3), "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}


@pytest.fixture(scope="module", params=VARIANTS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_bart(tmp_path_factory.mktemp("backbone"), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def model(backbone: Backbone) -> Model:
    return load_model(backbone, TorchKernels())


def random_rows(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    return [[rng.randrange(320) for _ in range(rng.choice([1, 2, longest]))] for _ in range(count)]


def flattened(rows: Sequence[Sequence[int]], first: int) -> tuple[Tensor, Tensor]:
    """Ids and positions, one row behind the other."""
    ids = [token for row in rows for token in row]
    return torch.tensor(ids), torch.cat([torch.arange(first, first + len(row)) for row in rows])


def dense_logits(
    model: Model, inputs: list[list[int]], outputs: list[list[int]], parts: Parts, units: Sequence[int] = ()
) -> list[Tensor]:
    """Logits ``(len(output), vocab)`` per row. The encoder stops after each of ``units`` and goes on."""
    assert model.encoder is not None
    prefix, positions = parts
    first = {s: prefix[s][0].shape[1] if positions.get(s) == "shifted" else 0 for s in SITES}
    attention = DenseAttention([len(row) for row in outputs], prefix, [len(row) for row in inputs])
    hidden = model.encoder.embed(*flattened(inputs, first["encoder"]))
    stops = [0, *units, model.encoder.units]
    for begin, end in itertools.pairwise(stops):
        hidden = model.encoder.advance(hidden, range(begin, end), attention)
    states = model.embed(*flattened(outputs, first["decoder"]))
    for layer in model.layers:
        states = layer(states, attention)
    return list(model.logits(states).split([len(output) for output in outputs]))


SUBSETS: list[tuple[Site, ...]] = [tuple(s for bit, s in enumerate(SITES) if mask >> bit & 1) for mask in range(8)]


@pytest.mark.parametrize("sites", SUBSETS, ids=str)
@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
def test_every_row_of_a_ragged_batch_equals_the_reference(
    backbone: Backbone, model: Model, sites: tuple[Site, ...], positions: Positions
) -> None:
    rng = random.Random(len(sites))
    lengths: dict[Site, int] = {"encoder": 7, "decoder": 3, "cross": 10}
    parts = parts_of(random_bart_prefix(backbone.spec, sites, lengths, positions, seed=4), torch.float64)
    inputs, outputs = random_rows(rng, 6, 40), random_rows(rng, 6, 11)
    found = dense_logits(model, inputs, outputs, parts)
    for row, input_ids, output_ids in zip(found, inputs, outputs, strict=True):
        expected = reference_logits(backbone.model, input_ids, output_ids, *parts)
        torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-10)
        if sites:
            bare = reference_logits(backbone.model, input_ids, output_ids, {}, {})
            assert (bare - expected).abs().max() > 1e-3, "a prefix that changes nothing"


def test_the_encoder_stops_and_goes_on_after_any_unit(backbone: Backbone, model: Model) -> None:
    assert model.encoder is not None
    units = model.encoder.units
    assert units == backbone.spec.sites["encoder"].layers + backbone.spec.sites["cross"].layers
    parts = parts_of(random_bart_prefix(backbone.spec), torch.float64)
    inputs, outputs = [[5, 6, 7], [8]], [[2, 9], [2, 0]]
    whole = dense_logits(model, inputs, outputs, parts)
    for stops in ([1], [units - 1], list(range(1, units))):
        for row, expected in zip(dense_logits(model, inputs, outputs, parts, stops), whole, strict=True):
            assert torch.equal(row, expected)


def test_the_window_fits_to_its_last_position(backbone: Backbone, model: Model) -> None:
    prefix = random_bart_prefix(backbone.spec, length={"decoder": 60, "encoder": 24, "cross": 5}, positions="shifted")
    parts = parts_of(prefix, torch.float64)
    input_ids, output_ids = random.Random(0).sample(range(320), 40), [2, 5, 6, 7]
    expected = reference_logits(backbone.model, input_ids, output_ids, *parts)
    found = dense_logits(model, [input_ids], [output_ids], parts)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_transformers_own_forward_still_works_over_the_fused_weights(backbone: Backbone, model: Model) -> None:
    """The modules' weights became views of the fused tensors: of the right ones."""
    theirs = backbone.model(torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[2, 9]])).logits[0]
    ours = dense_logits(model, [[5, 6, 7]], [[2, 9]], ({}, {}))[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    attention = backbone.model.model.decoder.layers[0].self_attn
    storages = {part.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.k_proj)}
    assert len(storages) == 1
