"""The two parameterisations: shapes, initialisation, what may move."""

from __future__ import annotations

import pytest
import torch

from prefixes.errors import InvalidParameter
from prefixes.spec import Site, SiteGeometry
from trainer.training.reparam import DirectPrefix, MlpPrefix, PrefixKV

SITES: dict[Site, SiteGeometry] = {"decoder": SiteGeometry(3, 2, 4), "cross": SiteGeometry(1, 4, 2)}
LENGTH = 5


def activations() -> PrefixKV:
    torch.manual_seed(7)
    return {
        site: (
            torch.randn(geometry.layers, LENGTH, geometry.kv_heads, geometry.head_dim),
            torch.randn(geometry.layers, LENGTH, geometry.kv_heads, geometry.head_dim),
        )
        for site, geometry in SITES.items()
    }


@pytest.mark.parametrize("prefix", [MlpPrefix(SITES, LENGTH, middle=32), DirectPrefix(SITES, LENGTH)])
def test_every_site_gets_keys_and_values_of_its_geometry(prefix: MlpPrefix | DirectPrefix) -> None:
    made = prefix()
    assert made.keys() == SITES.keys()
    for site, geometry in SITES.items():
        expected = (geometry.layers, LENGTH, geometry.kv_heads, geometry.head_dim)
        assert {tensor.shape for tensor in made[site]} == {torch.Size(expected)}


def test_mlp_has_the_papers_layers_as_wide_as_a_key() -> None:
    network = MlpPrefix({"decoder": SITES["decoder"]}, LENGTH, middle=32).networks["decoder"]
    assert [type(layer).__name__ for layer in network.children()] == ["Embedding", "Linear", "Tanh", "Linear"]
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    assert shapes == [(5, 8), (32, 8), (32,), (3 * 2 * 2 * 4, 32), (3 * 2 * 2 * 4,)]


def test_direct_initialisation_is_exact() -> None:
    prefix, wanted = DirectPrefix(SITES, LENGTH, frozen=2), activations()
    assert prefix.initialise(wanted) == 0.0
    for site in SITES:
        assert all(torch.equal(got, want) for got, want in zip(prefix()[site], wanted[site], strict=True))


def test_mlp_initialisation_regresses_onto_the_activations() -> None:
    torch.manual_seed(0)
    prefix, wanted = MlpPrefix(SITES, LENGTH, middle=256), activations()
    error = prefix.initialise(wanted)
    assert error < 1e-3
    for site in SITES:
        for got, want in zip(prefix()[site], wanted[site], strict=True):
            torch.testing.assert_close(got, want, atol=0.1, rtol=0)
    assert all(parameter.grad is None for parameter in prefix.parameters())


def test_frozen_positions_keep_their_values_and_the_others_learn() -> None:
    torch.manual_seed(0)
    prefix = DirectPrefix(SITES, LENGTH, frozen=2)
    prefix.initialise(activations())
    before = {site: (key.clone(), value.clone()) for site, (key, value) in prefix().items()}
    sum(tensor.square().sum() for pair in prefix().values() for tensor in pair).backward()
    torch.optim.SGD(prefix.parameters(), lr=0.1).step()
    for site, pair in prefix().items():
        for got, old in zip(pair, before[site], strict=True):
            assert torch.equal(got[:, :2], old[:, :2])
            assert not torch.equal(got[:, 2:], old[:, 2:])


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="frozen positions: expected 0 to 4, got 5"):
        DirectPrefix(SITES, LENGTH, frozen=LENGTH)
