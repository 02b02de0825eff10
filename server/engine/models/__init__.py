"""Our own lean modules over transformers' weights: one file per family, one table of them here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from prefixes.backbone import Backbone
from server.engine.kernels.base import Attention, Kernels
from server.engine.models.gpt2 import GPT2

__all__ = ["Model", "load_model"]


class Model(Protocol):
    """What the runner and the trainer call. Knows no batch: tokens come flattened, contexts live in ``attention``."""

    def decoder(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """``(tokens,)`` ids and positions -> ``(tokens, hidden)``, before the final norm."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(n, hidden)`` of the tokens that need it -> ``(n, vocab)``: final norm and head."""


_FAMILIES: dict[str, Callable[[Backbone, Kernels], Model]] = {"gpt2": GPT2}


def load_model(backbone: Backbone, kernels: Kernels) -> Model:
    """Our modules over ``backbone``'s weights, in its dtype and on its device."""
    return _FAMILIES[backbone.spec.family](backbone, kernels)
