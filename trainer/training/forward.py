"""Runs a training batch through the frozen model: the encoder if there is one, then the decoder, behind a prefix.

Owns the forward pass and how much of it is computed and kept; knows no parameterisation and no optimiser. Gradients
flow to the prefix. ``loss.py`` goes on from the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefixes.spec import PrefixSpec
from server.engine.kernels.base import Attention
from server.engine.kernels.dense import DenseAttention, PrefixKV
from server.engine.models import Model
from trainer.data.sequences import Batch, Ragged


@dataclass(frozen=True)
class Compute:
    """How a batch is computed; the result is the same up to rounding.

    ``autocast``: matrix products in this dtype, norms, sums and the loss in float32 (``DenseKernels`` with the same
    dtype make the model's linear layers). ``recompute``: keep only each layer's input, and run the layer once more for
    the gradient.
    """

    autocast: torch.dtype | None = None
    recompute: bool = False

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The context for a forward pass and its loss."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)

    def run(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``layer`` over ``x``."""
        if not self.recompute:
            return layer(x)
        # The frozen model has no dropout: there is no random state to restore.
        made: Tensor = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        return made


PLAIN: Final = Compute()


def forward_hidden(
    model: Model, batch: Batch, prefix: PrefixKV, plan: PrefixSpec | None, compute: Compute = PLAIN
) -> Tensor:
    """Hidden states ``(learnt, hidden)`` at ``batch.predict``, with every sequence behind ``prefix``.

    ``plan`` says how positions count behind the prefix; None without one.
    """
    lengths = batch.inputs.lengths if batch.inputs is not None else None
    unplaced = [site for site in prefix if plan is None or not plan.position_offset(site)]
    attention = DenseAttention(batch.read.lengths, prefix, lengths, model.scores, unplaced)
    if batch.inputs is not None:
        offset = plan.position_offset("encoder") if plan else 0
        run_encoder(model, batch.inputs, attention, offset, compute)
    offset = plan.position_offset("decoder") if plan else 0
    return run_decoder(model, batch.read, attention, offset, batch.predict, compute)


def run_encoder(model: Model, read: Ragged, attention: Attention, offset: int, compute: Compute = PLAIN) -> None:
    """Encode what it reads, and store cross-attention's keys and values in ``attention``."""
    assert model.encoder is not None, "only examples for an encoder have inputs apart"
    encoder, layers = model.encoder, len(model.encoder.layers)
    x = encoder.embed(read.ids, _positions(read, offset))
    for layer in encoder.layers:
        x = compute.run(partial(layer, attention=attention), x)
    encoder.advance(x, range(layers, encoder.units), attention)


def run_decoder(
    model: Model, read: Ragged, attention: Attention, offset: int, wanted: Tensor, compute: Compute = PLAIN
) -> Tensor:
    """Hidden states ``(wanted, hidden)`` at ``wanted``, indices into ``read.ids``.

    Behind the last layer's attention, only the wanted tokens are computed.
    """
    positions = _positions(read, offset)
    x, attention = model.embed(read.ids, positions), model.attention(positions, attention)
    *layers, last = model.layers
    for layer in layers:
        x = compute.run(partial(layer, attention=attention), x)
    return compute.run(lambda x: last.feed_forward(last.attend(x, attention)[wanted]), x)


def _positions(read: Ragged, offset: int) -> Tensor:
    places = [torch.arange(offset, offset + length) for length in read.lengths]
    return torch.cat(places).to(read.ids.device)
