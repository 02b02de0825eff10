"""A training batch through the frozen model: the encoder where there is one, then the decoder, behind a prefix.

Owns the forward pass and the losses over it; knows no parameterisation and no optimiser. Gradients flow to the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from prefixes.spec import PrefixSpec
from server.engine.kernels.base import Attention
from server.engine.kernels.dense import DenseAttention
from server.engine.models import Model
from trainer.config import Reduction
from trainer.reparam import PrefixKV
from trainer.sequences import Batch, TokenExample, collate

VALIDATION_BATCH = 32


def forward_logits(model: Model, batch: Batch, prefix: PrefixKV, plan: PrefixSpec | None) -> Tensor:
    """``(learnt, vocab)`` logits where the batch learns, every sequence behind ``prefix``.

    ``plan`` says how positions count behind it; None where there is no prefix.
    """
    lengths = batch.inputs.lengths if batch.inputs is not None else None
    attention = DenseAttention(batch.ids.shape[0], prefix, lengths)
    if batch.inputs is not None:
        run_encoder(model, batch.inputs.ids, attention, plan.position_offset("encoder") if plan else 0)
    hidden = run_decoder(model, batch.ids, attention, plan.position_offset("decoder") if plan else 0)
    return model.logits(hidden[batch.predict])


def run_encoder(model: Model, ids: Tensor, attention: Attention, offset: int) -> None:
    """Encode ``ids (sequences, length)``; cross-attention's keys and values are stored in ``attention``."""
    assert model.encoder is not None, "only examples for an encoder have inputs apart"
    hidden = model.encoder.embed(ids.flatten(), _positions(ids, offset))
    model.encoder.advance(hidden, range(model.encoder.units), attention)


def run_decoder(model: Model, ids: Tensor, attention: Attention, offset: int) -> Tensor:
    """Hidden states ``(sequences * length, hidden)`` of ``ids (sequences, length)``."""
    return model.decoder(ids.flatten(), _positions(ids, offset), attention)


def _positions(ids: Tensor, offset: int) -> Tensor:
    rows, length = ids.shape
    return torch.arange(offset, offset + length, device=ids.device).repeat(rows)


def batch_loss(logits: Tensor, batch: Batch, reduction: Reduction) -> Tensor:
    """``sequence``: summed over a sequence's learnt tokens, mean over the batch; ``token``: mean over learnt tokens."""
    if reduction == "token":
        return functional.cross_entropy(logits, batch.targets)
    return functional.cross_entropy(logits, batch.targets, reduction="sum") / batch.ids.shape[0]


@torch.no_grad()
def token_loss(model: Model, examples: Sequence[TokenExample], prefix: PrefixKV, plan: PrefixSpec, pad: int) -> float:
    """Mean loss per learnt token over ``examples``."""
    ordered = sorted(examples, key=lambda example: example.size)
    total, count = 0.0, 0
    for begin in range(0, len(ordered), VALIDATION_BATCH):
        batch = collate(ordered[begin : begin + VALIDATION_BATCH], pad, next(iter(prefix.values()))[0].device)
        logits = forward_logits(model, batch, prefix, plan)
        total += functional.cross_entropy(logits, batch.targets, reduction="sum").item()
        count += batch.targets.numel()
    return total / count
