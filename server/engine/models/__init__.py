"""Our own lean modules over transformers' weights: one file per family, one table of them here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from prefixes.backbone import Backbone
from server.engine.kernels.base import Attention, Kernels
from server.engine.models.bart import Bart
from server.engine.models.gpt2 import GPT2
from server.engine.models.layers import LayerCall, at_once

__all__ = ["Encoder", "LayerCall", "Model", "load_model"]


class Encoder(Protocol):
    """An encoder-decoder's first half, in units of resumable work.

    A unit is one of the encoder's ``layers`` or, behind the last one, the cross-attention keys and values of a decoder
    layer.
    """

    layers: int
    units: int  # all of them

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``(tokens,)`` ids and positions -> ``(tokens, hidden)``: what unit 0 takes."""

    def advance(
        self, hidden: torch.Tensor, units: range, attention: Attention, *, call: LayerCall = at_once
    ) -> torch.Tensor:
        """Run ``units`` over whole inputs, flattened; what the next unit takes. Cross-attention's part is stored in
        ``attention``. ``call`` runs each layer.
        """


class Model(Protocol):
    """What the runner and the trainer call. Knows no batch: tokens come flattened, contexts live in ``attention``."""

    @property
    def encoder(self) -> Encoder | None:
        """None where the decoder reads the input itself."""

    def decoder(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        *,
        wanted: torch.Tensor | None = None,
        call: LayerCall = at_once,
    ) -> torch.Tensor:
        """``(tokens,)`` ids and positions -> ``(tokens, hidden)``, before the final norm.

        With ``wanted (n,)``, indices of tokens, ``(n, hidden)`` of them alone: behind the last layer's attention the
        others are not computed. ``call`` runs each layer.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(n, hidden)`` of the tokens that need it -> ``(n, vocab)``: final norm and head."""


_FAMILIES: dict[str, Callable[[Backbone, Kernels], Model]] = {"gpt2": GPT2, "bart": Bart}


def load_model(backbone: Backbone, kernels: Kernels) -> Model:
    """Our modules over ``backbone``'s weights, in its dtype and on its device."""
    return _FAMILIES[backbone.spec.family](backbone, kernels)
