"""What a run will make, as the metadata of its artifact: sites, lengths, positions, template. No tensor exists yet.

Owns what depends on the kind of backbone before training: the template that is used where none is asked for, and how
positions count. Everything later (data, loop, export) reads the plan and asks nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from prefixes.spec import Positions, PrefixSpec, Site, SitePrefix, check_compatible, split_template
from trainer.training.config import DEMO_TEMPLATE, GPT2_TEMPLATE, TrainConfig

PAPER_POSITIONS: Final[Mapping[Site, Positions]] = {"decoder": "shifted", "encoder": "unshifted"}
"""By the site that reads the input: a decoder alone counts on behind its prefix, an encoder-decoder does not."""


def plan_prefix(
    config: TrainConfig, backbone: Backbone, template: str | None = None, defaults: Mapping[str, Any] | None = None
) -> PrefixSpec:
    """The artifact's metadata, its origin apart, which only the finished run knows.

    ``template`` None is the backbone's usual one. Raises InvalidParameter for a site that the backbone does not have,
    IncompatiblePrefix for a length that its window does not have.
    """
    spec = backbone.spec
    for site in config.sites:
        if site not in spec.sites:
            raise InvalidParameter(f"sites: this backbone has {', '.join(spec.sites)}, got {site!r}", got=site)
    chosen = config.positions or PAPER_POSITIONS[spec.input_site]
    sites: dict[Site, SitePrefix] = {}
    for site in config.sites or spec.sites:
        # Cross-attention's keys have no positions of their own: nothing there can shift.
        positions: Positions = "unshifted" if site == "cross" else chosen
        sites[site] = SitePrefix(config.prefix_length, positions, spec.sites[site], dtype_of(backbone))
    template = usual_template(backbone) if template is None else template
    split_template(template)
    plan = PrefixSpec(spec.fingerprint, sites, template, dict(defaults or {}))
    check_compatible(plan, spec)
    return plan


def usual_template(backbone: Backbone) -> str:
    """What stands around an input where no template is asked for.

    An encoder reads what it was pretrained on; a decoder alone needs a mark between input and output as well.
    """
    if backbone.spec.input_site == "encoder":
        return backbone.input_template
    return DEMO_TEMPLATE if backbone.name == "demo" else GPT2_TEMPLATE


def dtype_of(backbone: Backbone) -> str:
    """What a prefix is trained in: float32, also under a half-precision model; float64 under a float64 one."""
    return "float64" if next(backbone.model.parameters()).dtype == torch.float64 else "float32"
