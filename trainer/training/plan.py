"""Plans a run's prefix as the metadata of its artifact: sites, lengths, positions, template. Knows no tensor.

Owns the choices that depend on the kind of backbone: the default template, and how positions count. Data, loop and
export read the plan and never ask for the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from prefixes.spec import Positions, PrefixSpec, Site, SitePrefix, check_compatible
from server.parameters import WITHOUT_LIMITS, check_defaults
from trainer.training.config import DEMO_TEMPLATE, GPT2_TEMPLATE, LINE_TEMPLATE, TrainConfig

PAPER_POSITIONS: Final[Mapping[Site, Positions]] = {"decoder": "shifted", "encoder": "unshifted"}
"""By the site that reads the input: positions continue behind the prefix for a decoder alone, not with an encoder."""


def plan_prefix(
    config: TrainConfig, backbone: Backbone, template: str | None = None, defaults: Mapping[str, Any] | None = None
) -> PrefixSpec:
    """Return the artifact's metadata without its origin, which only the finished run knows.

    ``template`` None is the backbone's usual one. Raises InvalidParameter for a site that the backbone does not have,
    marks in the template that its tokenizer does not know, and defaults that the server refuses, IncompatiblePrefix for
    a length that its window does not hold.
    """
    spec = backbone.spec
    for site in config.sites:
        if site not in spec.sites:
            raise InvalidParameter(f"sites: this backbone has {', '.join(spec.sites)}, got {site!r}", got=site)
    chosen = config.positions or PAPER_POSITIONS[spec.input_site]
    sites: dict[Site, SitePrefix] = {}
    for site in config.sites or spec.sites:
        # Keys of cross-attention have no positions, so none can shift.
        positions: Positions = "unshifted" if site == "cross" else chosen
        sites[site] = SitePrefix(config.prefix_length, positions, spec.sites[site], dtype_of(backbone))
    template = usual_template(backbone) if template is None else template
    backbone.prompt_encoder.check_marks(template)
    check_defaults(defaults or {}, backbone.generation_defaults, WITHOUT_LIMITS)
    plan = PrefixSpec(spec.fingerprint, sites, template, dict(defaults or {}))
    check_compatible(plan, spec)
    return plan


def usual_template(backbone: Backbone) -> str:
    """Return the template for runs that ask for none.

    An encoder gets the form it was pretrained on. A decoder alone also needs a mark between input and output: GPT-2 the
    paper's, if its tokenizer has that token; any other a line break, which every tokenizer has.
    """
    if backbone.spec.input_site == "encoder":
        return backbone.input_template
    if backbone.name == "demo":
        return DEMO_TEMPLATE
    marked = backbone.spec.family == "gpt2" and not backbone.prompt_encoder.unknown_marks(GPT2_TEMPLATE)
    return GPT2_TEMPLATE if marked else LINE_TEMPLATE


def dtype_of(backbone: Backbone) -> str:
    """Return the dtype that a prefix is trained in: float64 for a float64 model, float32 for any other."""
    return "float64" if next(backbone.model.parameters()).dtype == torch.float64 else "float32"
