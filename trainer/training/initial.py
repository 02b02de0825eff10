"""What a prefix starts from, apart from random numbers and words: the head of a text, or another version.

Owns checking and naming it (what an artifact says it came from); ``words.py`` owns the activations over texts,
the parameterisation how it takes them over: ``direct`` exactly, ``mlp`` by a regression whose error the report tells.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from prefixes.artifact import Prefix, read_prefix, version_of
from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from prefixes.spec import PrefixSpec, SitePrefix, check_compatible
from server.engine.models import Model
from trainer.training.export import unfold
from trainer.training.plan import dtype_of
from trainer.training.reparam import PrefixKV
from trainer.training.words import text_activations, text_tokens


@dataclass(frozen=True)
class InitialText:
    """A text whose first tokens, as many as the prefix is long, the frozen model's own keys and values are taken of."""

    text: str = field(repr=False)

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.text.encode()).hexdigest()}"

    def as_dict(self) -> dict[str, Any]:
        """What an artifact says of it."""
        return {"kind": "text", "digest": self.digest}

    def check(self, backbone: Backbone, plan: PrefixSpec) -> None:
        """Raise InvalidParameter for a text that is shorter than the prefix."""
        text_tokens(backbone, self.text, _length(plan))

    def activations(self, model: Model, backbone: Backbone, plan: PrefixSpec) -> PrefixKV:
        """Keys and values at each of ``plan``'s sites. Raises as ``check`` does."""
        return text_activations(model, backbone, self.text, _length(plan), plan.sites)


@dataclass(frozen=True)
class InitialVersion:
    """A finished prefix to go on from: a warm start."""

    version: str
    prefix: Prefix = field(repr=False)

    @classmethod
    def read(cls, artifact: bytes) -> InitialVersion:
        """From an artifact's bytes. Raises InvalidArtifact."""
        prefix = read_prefix(artifact)
        return cls(version_of(prefix), prefix)

    def as_dict(self) -> dict[str, Any]:
        """What an artifact says of it."""
        return {"kind": "version", "version": self.version}

    def check(self, backbone: Backbone, plan: PrefixSpec) -> None:
        """Raise IncompatiblePrefix for another backbone's, InvalidParameter for other sites, lengths or positions."""
        check_compatible(self.prefix.spec, backbone.spec)
        wanted, found = (
            {site: _shape(sited) for site, sited in spec.sites.items()} for spec in (plan, self.prefix.spec)
        )
        if wanted != found:
            raise InvalidParameter(
                f"initial version {self.version}: expected {_described(wanted)}, got {_described(found)}",
                expected=wanted,
                got=found,
            )

    def activations(self, model: Model, backbone: Backbone, plan: PrefixSpec) -> PrefixKV:
        """Its keys and values. Raises as ``check`` does."""
        self.check(backbone, plan)
        device, dtype = next(backbone.model.parameters()).device, getattr(torch, dtype_of(backbone))
        return {
            site: (key.to(device, dtype), value.to(device, dtype)) for site, (key, value) in unfold(self.prefix).items()
        }


Initial = InitialText | InitialVersion


def _length(plan: PrefixSpec) -> int:
    return max(planned.length for planned in plan.sites.values())  # the same at every site


def _shape(sited: SitePrefix) -> tuple[int, str]:
    return sited.length, sited.positions


def _described(sites: dict[Any, tuple[int, str]]) -> str:
    return ", ".join(f"{site} of length {length} ({positions})" for site, (length, positions) in sites.items())
