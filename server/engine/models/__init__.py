"""Our own lean modules over transformers' weights: one file per family, one table of them here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from prefixes.backbone import Backbone
from prefixes.spec import Site
from server.engine.kernels.base import Attention, Kernels, Scores
from server.engine.models.bart import Bart
from server.engine.models.gpt2 import GPT2
from server.engine.models.layers import Layer
from server.engine.models.llama import Llama
from server.engine.models.t5 import T5

__all__ = ["Encoder", "Layer", "Model", "load_model"]


class Encoder(Protocol):
    """An encoder-decoder's first half, in units of resumable work.

    A unit is one of the encoder's ``layers`` or, behind the last one, the cross-attention keys and values of one
    decoder layer.
    """

    units: int  # all of them

    @property
    def layers(self) -> Sequence[Layer]:
        """The first units."""

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``(tokens,)`` ids and positions -> ``(tokens, hidden)``: what unit 0 takes."""

    def advance(self, hidden: torch.Tensor, units: range, attention: Attention) -> torch.Tensor:
        """Run ``units`` over whole inputs, flattened; returns what the next unit takes. Cross-attention's keys and
        values are stored in ``attention``.
        """


class Model(Protocol):
    """The parts of a decoder. The runner and the trainer call ``embed``, each of ``layers``, then ``logits``. Knows no
    batch: tokens come flattened, and rows' contexts are in the ``Attention`` that layers get, see ``attention``.
    """

    @property
    def encoder(self) -> Encoder | None:
        """None where the decoder reads the input itself."""

    @property
    def layers(self) -> Sequence[Layer]:
        """In order."""

    @property
    def scores(self) -> Mapping[Site, Scores]:
        """What attention gets at the sites where scores are not simply products over ``sqrt(head_dim)``."""

    def attention(self, positions: torch.Tensor, attention: Attention) -> Attention:
        """What layers get in a call over tokens at ``positions (tokens,)``, where these count in attention too."""

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``(tokens,)`` ids and positions -> ``(tokens, hidden)``: what the first layer takes."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(n, hidden)`` of the tokens that need it -> ``(n, vocab)``: final norm and head."""


_FAMILIES: dict[str, Callable[[Backbone, Kernels], Model]] = {"gpt2": GPT2, "bart": Bart, "llama": Llama, "t5": T5}


def load_model(backbone: Backbone, kernels: Kernels) -> Model:
    """Our modules over ``backbone``'s weights, in its dtype and on its device."""
    return _FAMILIES[backbone.spec.family](backbone, kernels)
