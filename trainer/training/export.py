"""From a trained prefix to an artifact's content: fold, and describe.

Owns what the artifact and the record beside it say. What a repetition of the run would give again stands in the
artifact; what depends on chance or on who ran it stands in the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefixes.artifact import Prefix
from prefixes.spec import PrefixSpec
from trainer.training.config import TrainConfig
from trainer.training.reparam import PrefixKV


@dataclass(frozen=True)
class Provenance:
    """What the prefix was made from."""

    train_digest: str
    train_examples: int
    train_cut: int  # inputs that lost their end to the window
    validation_digest: str | None
    validation_examples: int
    steps: int
    best_step: int
    initial: Mapping[str, Any] | None = None  # the text or version it started from, where there was one


def origin_of(config: TrainConfig, provenance: Provenance, backbone: str) -> dict[str, Any]:
    """The artifact's ``origin``: data, method, hyperparameters. A folder's path is private: only its name is kept."""
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
    }
    return made if provenance.initial is None else made | {"initial": dict(provenance.initial)}


def fold(kv: PrefixKV, plan: PrefixSpec, origin: Mapping[str, Any]) -> Prefix:
    """The artifact's content from keys and values ``(layers, prefix_len, kv_heads, head_dim)`` at each of its sites."""
    tensors = {}
    for site in plan.sites:
        for part, tensor in zip(("key", "value"), kv[site], strict=True):
            tensors[f"{site}.{part}"] = tensor.detach().cpu().contiguous()
    return Prefix(replace(plan, origin=dict(origin)), tensors)


def unfold(prefix: Prefix) -> PrefixKV:
    """Keys and values per site, as the loop and the dense kernels take them."""
    return {site: (prefix.tensors[f"{site}.key"], prefix.tensors[f"{site}.value"]) for site in prefix.spec.sites}
