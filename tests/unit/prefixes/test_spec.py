"""Whether a prefix fits a backbone, on GPT-2's one site and BART's three: named errors that say expected and got."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from prefixes.errors import IncompatiblePrefix
from prefixes.spec import (
    SITES,
    BackboneSpec,
    Positions,
    PrefixSpec,
    Site,
    SiteGeometry,
    SitePrefix,
    check_compatible,
)
from tests.support.prefixes import make_backbone_spec, make_encoder_decoder_spec

BART = make_encoder_decoder_spec(encoder_layers=3, decoder_layers=2)
SUBSETS = [sites for count in (1, 2, 3) for sites in combinations(SITES, count)]


def spec_for(
    backbone: BackboneSpec, *sites: Site, length: int = 5, positions: Positions = "unshifted"
) -> PrefixSpec:
    made = {site: SitePrefix(length, positions, backbone.sites[site], "float32") for site in sites}
    return PrefixSpec(backbone.fingerprint, made)


def with_geometry(prefix: PrefixSpec, site: Site, geometry: SiteGeometry) -> PrefixSpec:
    return replace(prefix, sites={**prefix.sites, site: replace(prefix.sites[site], geometry=geometry)})


@pytest.mark.parametrize("sites", SUBSETS, ids=str)
def test_any_subset_of_the_sites_fits(sites: tuple[Site, ...]) -> None:
    check_compatible(spec_for(BART, *sites), BART)


@pytest.mark.parametrize("site", ["encoder", "decoder"])
def test_encoder_and_decoder_may_be_shifted_within_the_window(site: Site) -> None:
    check_compatible(spec_for(BART, site, length=63, positions="shifted"), BART)
    check_compatible(spec_for(BART, site, length=500, positions="unshifted"), BART)
    with pytest.raises(IncompatiblePrefix, match=f"'{site}': expected less than the window of 64, got 64"):
        check_compatible(spec_for(BART, site, length=64, positions="shifted"), BART)


def test_a_cross_prefix_is_never_shifted() -> None:
    with pytest.raises(IncompatiblePrefix, match=r"at site 'cross': expected 'unshifted' .* got 'shifted'"):
        check_compatible(spec_for(BART, "cross", positions="shifted"), BART)


@pytest.mark.parametrize("site", SITES)
def test_the_layers_are_those_of_the_site(site: Site) -> None:
    """The encoder has three layers and the decoder two: taking the one for the other shows."""
    other = {"encoder": "decoder", "decoder": "encoder", "cross": "encoder"}[site]
    prefix = with_geometry(spec_for(BART, *SITES), site, BART.sites[other])  # type: ignore[index]
    with pytest.raises(IncompatiblePrefix, match=f"geometry at site '{site}'") as raised:
        check_compatible(prefix, BART)
    assert raised.value.detail == {
        "expected": BART.sites[site].as_dict(), "got": prefix.sites[site].geometry.as_dict(), "site": site
    }  # fmt: skip


@pytest.mark.parametrize("geometry", [SiteGeometry(3, 4, 4), SiteGeometry(3, 2, 8)])
def test_heads_must_fit_too(geometry: SiteGeometry) -> None:
    with pytest.raises(IncompatiblePrefix, match="geometry at site 'encoder'"):
        check_compatible(with_geometry(spec_for(BART, "encoder"), "encoder", geometry), BART)


@pytest.mark.parametrize("site", ["encoder", "cross"])
def test_a_decoder_alone_has_no_other_site(site: Site) -> None:
    gpt2 = make_backbone_spec()
    with pytest.raises(IncompatiblePrefix, match=f"site '{site}': a gpt2 backbone has only decoder"):
        check_compatible(spec_for(BART, site), gpt2)


def test_another_backbone_of_the_same_shape_is_refused() -> None:
    other = replace(BART, fingerprint="sha256:" + "cd" * 32)
    with pytest.raises(IncompatiblePrefix, match="backbone fingerprint"):
        check_compatible(spec_for(BART, "encoder"), other)


@pytest.mark.parametrize(
    ("site", "positions", "room"),
    [("encoder", "shifted", 59), ("encoder", "unshifted", 64), ("decoder", "shifted", 64), ("cross", "unshifted", 64)],
)
def test_the_inputs_room_is_the_encoders(site: Site, positions: Positions, room: int) -> None:
    assert BART.input_room(spec_for(BART, site, positions=positions)) == room
    assert BART.input_room(None) == 64


def test_a_decoders_input_leaves_room_for_one_token() -> None:
    gpt2 = make_backbone_spec()
    assert gpt2.input_room(None) == 63
    assert gpt2.input_room(spec_for(gpt2, "decoder", positions="shifted")) == 58
