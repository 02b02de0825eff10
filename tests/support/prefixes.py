"""Small random prefixes for tests: valid ones, of any geometry, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prefixes.artifact import Prefix
from prefixes.spec import INPUT_SLOT, BackboneSpec, Positions, PrefixSpec, Site, SiteGeometry, SitePrefix

FINGERPRINT = "sha256:" + "ab" * 32


def make_backbone_spec(
    *, layers: int = 2, kv_heads: int = 2, head_dim: int = 4, fingerprint: str = FINGERPRINT
) -> BackboneSpec:
    """A GPT-2-like spec without a model behind it."""
    return BackboneSpec(
        family="gpt2",
        sites={"decoder": SiteGeometry(layers, kv_heads, head_dim)},
        hidden_size=kv_heads * head_dim,
        vocab_size=100,
        max_positions=64,
        fingerprint=fingerprint,
    )


def make_prefix(
    backbone: BackboneSpec | None = None,
    *,
    length: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sites: tuple[Site, ...] = ("decoder",),
    positions: Positions = "shifted",
    template: str = INPUT_SLOT,
    defaults: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Prefix:
    """A valid random prefix for ``backbone`` (or a tiny one): the same content for the same arguments."""
    backbone = backbone or make_backbone_spec()
    generator = torch.Generator().manual_seed(seed)
    name = str(dtype).removeprefix("torch.")
    sited, tensors = {}, {}
    for site in sites:
        geometry = backbone.sites.get(site) or next(iter(backbone.sites.values()))
        sited[site] = SitePrefix(length, positions, geometry, name)
        for part in ("key", "value"):
            shape = (geometry.layers, length, geometry.kv_heads, geometry.head_dim)
            tensors[f"{site}.{part}"] = torch.randn(shape, generator=generator).to(dtype)
    return Prefix(PrefixSpec(backbone.fingerprint, sited, template, dict(defaults or {}), dict(origin or {})), tensors)
