"""From a trained prefix to a published version: fold, describe, write, publish.

Owns what the artifact and the record beside it say. What a repetition of the run would give again stands in the
artifact; what depends on chance or on who ran it stands in the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from prefixes.spec import Positions, PrefixSpec, SitePrefix
from trainer.config import TrainConfig
from trainer.reparam import PrefixKV

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Provenance:
    """What the prefix was made from."""

    train_digest: str
    train_examples: int
    validation_digest: str | None
    validation_examples: int
    steps: int
    best_step: int


def origin_of(config: TrainConfig, provenance: Provenance, backbone: str) -> dict[str, Any]:
    """The artifact's ``origin``: data, method, hyperparameters. A folder's path is private: only its name is kept."""
    return {
        "trainer": "prefixd",
        "method": f"prefix-tuning/{config.method}",
        "backbone": Path(backbone).name,
        "data": {
            "train": {"digest": provenance.train_digest, "examples": provenance.train_examples},
            "validation": {"digest": provenance.validation_digest, "examples": provenance.validation_examples},
        },
        "hyperparameters": config.as_dict(),
        "steps": provenance.steps,
        "best_step": provenance.best_step,
    }


def fold(
    kv: PrefixKV,
    backbone: Backbone,
    *,
    template: str,
    defaults: Mapping[str, Any],
    origin: Mapping[str, Any],
    positions: Positions = "shifted",
) -> Prefix:
    """The artifact's content from keys and values ``(layers, prefix_len, kv_heads, head_dim)`` per site."""
    sites, tensors = {}, {}
    for site, (key, value) in kv.items():
        tensors[f"{site}.key"], tensors[f"{site}.value"] = _plain(key), _plain(value)
        dtype = str(key.dtype).removeprefix("torch.")
        sites[site] = SitePrefix(key.shape[1], positions, backbone.spec.sites[site], dtype)
    spec = PrefixSpec(backbone.spec.fingerprint, sites, template, dict(defaults), dict(origin))
    return Prefix(spec, tensors)


def unfold(prefix: Prefix) -> PrefixKV:
    """Keys and values per site, as the loop and the dense kernels take them."""
    return {site: (prefix.tensors[f"{site}.key"], prefix.tensors[f"{site}.value"]) for site in prefix.spec.sites}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
