"""Starts of a prefix other than random numbers and words: the head of a text, training pairs, or another version.

Owns their checks and their names in artifacts. ``words.py`` owns the activations of texts. The parameterisation owns
how it takes activations: ``direct`` exactly, ``mlp`` by a regression whose error the report shows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from prefixes.artifact import Prefix, read_prefix, version_of
from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from prefixes.spec import PrefixSpec, SitePrefix, check_compatible
from server.engine.models import Model
from trainer.data.sequences import TokenExample
from trainer.training.export import unfold
from trainer.training.plan import dtype_of
from trainer.training.reparam import PrefixKV
from trainer.training.words import sequence_activations, text_activations, text_tokens


@dataclass(frozen=True)
class InitialText:
    """A text. The prefix starts from the frozen model's keys and values of its first tokens, one per position."""

    text: str = field(repr=False)

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.text.encode()).hexdigest()}"

    def as_dict(self) -> dict[str, Any]:
        """Its entry in an artifact's origin, JSON values."""
        return {"kind": "text", "digest": self.digest}

    def check(self, backbone: Backbone, plan: PrefixSpec) -> None:
        """Raise InvalidParameter if the text has fewer tokens than the prefix positions."""
        text_tokens(backbone, self.text, _length(plan))

    def activations(self, model: Model, backbone: Backbone, plan: PrefixSpec) -> PrefixKV:
        """Return keys and values at each of ``plan``'s sites. Raises the errors of ``check``."""
        return text_activations(model, backbone, self.text, _length(plan), plan.sites)


@dataclass(frozen=True)
class InitialExamples:
    """Training pairs. The prefix starts from the frozen model's keys and values over them.

    They are the very sequences that training learns from, one behind the other, cut to the prefix's length: a decoder
    with shifted positions goes on as behind worked examples. An encoder reads the pairs' inputs, its decoder their
    targets.
    """

    pairs: Sequence[TokenExample] = field(repr=False)

    @classmethod
    def draw(cls, train: Sequence[TokenExample], plan: PrefixSpec, seed: int) -> InitialExamples:
        """Draw as many pairs as fill ``plan``'s positions, or all where there are fewer."""
        order = random.Random(f"{seed}/examples").sample(train, len(train))
        count = 1
        while count < len(order) and _shortest(order[:count]) < _length(plan):
            count += 1
        return cls(order[:count])

    def as_dict(self) -> dict[str, Any]:
        """Its entry in an artifact's origin, JSON values. The data's digest and the seed say which pairs these are."""
        return {"kind": "examples", "examples": len(self.pairs)}

    def activations(self, model: Model, backbone: Backbone, plan: PrefixSpec) -> PrefixKV:
        """Return keys and values at each of ``plan``'s sites; too few tokens are repeated.

        Raises InvalidParameter for a prefix longer than the window.
        """
        length = _length(plan)
        outputs, inputs = ((stream * -(-length // max(1, len(stream))))[:length] for stream in _streams(self.pairs))
        return sequence_activations(model, backbone, inputs, outputs, plan.sites)


@dataclass(frozen=True)
class InitialVersion:
    """A warm start: a finished prefix to continue from."""

    version: str
    prefix: Prefix = field(repr=False)

    @classmethod
    def read(cls, artifact: bytes) -> InitialVersion:
        """Read an artifact's bytes. Raises InvalidArtifact."""
        prefix = read_prefix(artifact)
        return cls(version_of(prefix), prefix)

    def as_dict(self) -> dict[str, Any]:
        """Its entry in an artifact's origin, JSON values."""
        return {"kind": "version", "version": self.version}

    def check(self, backbone: Backbone, plan: PrefixSpec) -> None:
        """Raise IncompatiblePrefix for another backbone, InvalidParameter for other sites, lengths or positions."""
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
        """Return the version's keys and values. Raises the errors of ``check``."""
        self.check(backbone, plan)
        device, dtype = next(backbone.model.parameters()).device, getattr(torch, dtype_of(backbone))
        return {
            site: (key.to(device, dtype), value.to(device, dtype)) for site, (key, value) in unfold(self.prefix).items()
        }


Initial = InitialText | InitialVersion
"""What a run can be given to start from; examples are drawn from its own data."""


def _streams(pairs: Sequence[TokenExample]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of the decoder and of the encoder; without an encoder the second is empty."""
    return (
        tuple(token for pair in pairs for token in pair.ids),
        tuple(token for pair in pairs for token in pair.input_ids),
    )


def _shortest(pairs: Sequence[TokenExample]) -> int:
    """The tokens of whichever stream has fewer, of those that are read."""
    return min(len(stream) for stream in _streams(pairs) if stream)


def _length(plan: PrefixSpec) -> int:
    return max(planned.length for planned in plan.sites.values())  # the same at every site


def _shape(sited: SitePrefix) -> tuple[int, str]:
    return sited.length, sited.positions


def _described(sites: dict[Any, tuple[int, str]]) -> str:
    return ", ".join(f"{site} of length {length} ({positions})" for site, (length, positions) in sites.items())
