"""The loss over learnt tokens and its gradient, a few rows of logits at a time.

Owns the loss and its denominators; knows of a model only its ``logits``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from prefixes.spec import PrefixSpec
from server.engine.kernels.dense import PrefixKV
from server.engine.models import Model
from trainer.data.sequences import Batch, TokenExample, collate
from trainer.training.config import Reduction
from trainer.training.forward import PLAIN, Compute, forward_hidden

ROWS: Final = {"cpu": 256, "cuda": 2048}
"""Rows of logits at a time, by device: enough for a matrix product at full speed, and a bound for any batch."""

VALIDATION_TOKENS: Final = 4096
"""Tokens of a validation batch, on the grid of its attention. Nothing is kept for a gradient: it can be large."""


class _ChunkedLoss(torch.autograd.Function):
    """Sum of ``-log softmax(logits(hidden))[target]``; neither logits nor their gradient outlive their chunk.

    The forward pass also makes the gradient to the hidden states, ``(softmax - one-hot) · ∂logits``, while it has the
    logits. So the head is computed once, and ``(learnt, vocab)`` never exists whole.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, hidden.shape[0], rows):
            chunk = hidden[begin : begin + rows].detach()
            with torch.set_grad_enabled(gradient is not None):
                scores = logits(chunk.requires_grad_(gradient is not None))
            loss, per_logit = _softmax_loss(scores.detach(), targets[begin : begin + rows])
            total += loss
            if gradient is not None:
                gradient[begin : begin + rows] = torch.autograd.grad(scores, chunk, per_logit.to(scores.dtype))[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * outputs[0].to(gradient.dtype)), None, None, None


def _softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of ``logits (rows, vocab)``, and its gradient to them, which overwrites them unless they are half."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores.sub_(scores.amax(dim=1, keepdim=True))
    at = targets[:, None]
    of_targets = scores.gather(1, at)  # (rows, 1)
    sums = scores.exp_().sum(dim=1, keepdim=True)
    loss = (sums.log() - of_targets).sum()
    gradient = scores.div_(sums)
    gradient.scatter_add_(1, at, torch.full_like(of_targets, -1.0))
    return loss, gradient


def learnt_loss(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss summed over learnt tokens, from ``hidden (learnt, hidden)`` states that predict ``targets (learnt,)``."""
    rows = ROWS.get(hidden.device.type, ROWS["cpu"])
    total: Tensor = _ChunkedLoss.apply(hidden, targets, model.logits, rows)
    return total


def denominator(examples: Sequence[TokenExample], reduction: Reduction) -> int:
    """The divisor of a batch's summed loss: its number of sequences, or for ``token`` of learnt tokens."""
    return len(examples) if reduction == "sequence" else sum(example.learnt for example in examples)


def batch_loss(
    model: Model, batch: Batch, prefix: PrefixKV, plan: PrefixSpec | None, compute: Compute = PLAIN
) -> Tensor:
    """Loss summed over the learnt tokens of ``batch``."""
    with compute.context(batch.read.ids.device):
        hidden = forward_hidden(model, batch, prefix, plan, compute)
        return learnt_loss(model, hidden, batch.targets)


@torch.no_grad()
def token_loss(
    model: Model,
    examples: Sequence[TokenExample],
    prefix: PrefixKV,
    plan: PrefixSpec,
    compute: Compute = PLAIN,
    between: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss per learnt token over ``examples``. ``between`` is called before each batch."""
    device = next(iter(prefix.values()))[0].device
    total = 0.0
    for part in _validation_batches(examples):
        between()
        total += batch_loss(model, collate(part, device), prefix, plan, compute).item()
    return total / sum(example.learnt for example in examples)


def _validation_batches(examples: Sequence[TokenExample]) -> list[list[TokenExample]]:
    """Examples of similar length together: at most VALIDATION_TOKENS each, unless one example alone has more."""
    made: list[list[TokenExample]] = [[]]
    longest = 0  # of the last batch
    for example in sorted(examples, key=lambda example: example.size):
        longest = max(longest, *example.size)
        if made[-1] and (len(made[-1]) + 1) * longest > VALIDATION_TOKENS:
            made.append([])
            longest = max(example.size)
        made[-1].append(example)
    return made
