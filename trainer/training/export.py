"""Turns a trained prefix into an artifact's content, and describes its origin.

Owns what the artifact says: only facts that a repeated run would give again. Facts that depend on chance or on the user
go into the record beside it. Knows no file and no registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefixes.artifact import Prefix
from prefixes.spec import PrefixSpec
from trainer.data.seen import ENTRY, SeenInputs
from trainer.training.config import TrainConfig
from trainer.training.reparam import PrefixKV


@dataclass(frozen=True)
class Provenance:
    """The data and steps that the prefix comes from."""

    train_digest: str
    train_examples: int
    train_cut: int  # inputs that were cut to the window
    validation_digest: str | None
    validation_examples: int
    steps: int
    best_step: int
    seen: SeenInputs
    initial: Mapping[str, Any] | None = None  # the text, version or examples it started from, if any


def origin_of(config: TrainConfig, provenance: Provenance, backbone: str) -> dict[str, Any]:
    """Return the artifact's ``origin``: data, method, hyperparameters. Of the backbone's path only the name is kept."""
    made: dict[str, Any] = {
        "trainer": "prefixd",
        "method": f"prefix-tuning/{config.method}",
        "backbone": Path(backbone).name,
        "data": {
            "train": {
                "digest": provenance.train_digest,
                "examples": provenance.train_examples,
                "inputs_cut": provenance.train_cut,
            },
            "validation": {"digest": provenance.validation_digest, "examples": provenance.validation_examples},
        },
        "hyperparameters": config.as_dict(),
        "steps": provenance.steps,
        "best_step": provenance.best_step,
        ENTRY: provenance.seen.as_dict(),
    }
    return made if provenance.initial is None else made | {"initial": dict(provenance.initial)}


def fold(kv: PrefixKV, plan: PrefixSpec, origin: Mapping[str, Any]) -> Prefix:
    """Make the artifact's content from keys and values ``(layers, prefix_len, kv_heads, head_dim)`` per site."""
    tensors = {}
    for site in plan.sites:
        for part, tensor in zip(("key", "value"), kv[site], strict=True):
            tensors[f"{site}.{part}"] = tensor.detach().cpu().contiguous()
    return Prefix(replace(plan, origin=dict(origin)), tensors)


def unfold(prefix: Prefix) -> PrefixKV:
    """Return keys and values per site in the form that the loop and the dense kernels take."""
    return {site: (prefix.tensors[f"{site}.key"], prefix.tensors[f"{site}.value"]) for site in prefix.spec.sites}
