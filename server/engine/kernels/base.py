"""The interface between models and the machine: linear layers, and attention over block tables.

Owns the shapes and the contract that every kernel set keeps; knows no model and no scheduler. Models call ``Linear``
objects and one ``Attention``. For serving, a kernel set prepares a call's tables and the runner wraps them in
``PagedAttention``; the trainer uses ``dense.DenseAttention`` behind the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from prefixes.spec import Site

Activation = Literal["none", "gelu_new", "gelu", "relu", "silu"]
Quantization = Literal["none", "int8"]
"""What is kept of weights. int8: of a linear layer and an embedding an integer each and a scale for each output."""
Embedding = Callable[[torch.Tensor], torch.Tensor]
"""``(tokens,)`` ids -> ``(tokens, hidden)``."""
Gated = Callable[[torch.Tensor], torch.Tensor]
"""``(tokens, in) -> (tokens, out)``, weights, biases and activation bound."""


class Linear(Protocol):
    """A linear layer, its weight, bias and activation bound."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``(tokens, in) -> (tokens, out)``, added to ``residual (tokens, out)`` where there is one."""


class Norm(Protocol):
    """A norm over the last dimension, its weights and epsilon bound."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Norm of ``x (tokens, hidden)``, or of ``x + residual``."""


class Attention(Protocol):
    """What a model calls in each attention layer."""

    def __call__(
        self, site: Site, layer: int, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend ``query (tokens, heads, head_dim)`` to the rows' contexts at ``site``; same shape back.

        ``key`` and ``value``, ``(tokens, kv_heads, head_dim)``, belong to the same tokens and join the context first;
        None where the context is already complete (cross-attention). ``Scores`` say how products become scores.
        """

    def store(self, site: Site, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep ``key`` and ``value (tokens, kv_heads, head_dim)`` as the rows' own context at ``site``.

        Those of cross-attention are computed once per input, before the decoder's calls that attend to them.
        """


@dataclass(frozen=True)
class KVCache:
    """One pool of blocks for all layers and sites: ``(layers, blocks, kv_heads, block_size, head_dim)`` each.

    A block belongs to one site at a time and holds positions for all of that site's layers.

    Within a block one head's keys are contiguous, so that a kernel streams them at memory bandwidth.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]


@dataclass(frozen=True)
class Scores:
    """How a site's products of queries and keys become scores: ``scale * q·k + bias``, the same in all of its layers.

    ``bias (heads, 2 * reach + 1)`` is what a key adds by its distance, which is its position less the query's: distance
    ``d`` stands at ``d + reach``, and whatever is further away adds what stands at the end (Raffel et al. 2020, T5).
    """

    scale: float
    bias: torch.Tensor | None = None

    def bias_at(self, distances: torch.Tensor) -> torch.Tensor:
        """``(heads, *distances.shape)``, where there is a bias."""
        assert self.bias is not None, "scores without a bias"
        reach = self.bias.shape[1] // 2
        return self.bias[:, distances.clamp(-reach, reach) + reach]


@dataclass(frozen=True)
class PagedBatch:
    """The rows of one call, as tables. Tokens are ordered row by row; row ``r`` has ``counts[r]`` of them, maybe none.

    A row's context has two segments: ``[prefix | own]``, or ``[cross prefix | encoder]`` for cross-attention. There the
    rows of one request form one row of several tokens, so that what they share is read once. Segment ``s`` holds
    ``lengths[r, s]`` keys in blocks ``tables[r, s]``, padded with 0. If ``causal``, the call's own tokens are the last
    of segment 1 and count in its length: token ``i`` of ``n`` sees all of segment 0 and the first
    ``lengths[r, 1] - n + i + 1`` keys of segment 1. Otherwise every token sees all of both.

    For a bias by distance, a row's keys stand at positions 0, 1, 2 and so on, through both segments, and the call's own
    tokens are the last. Its first ``unplaced[r]`` keys stand nowhere and get no bias: those of an unshifted prefix.
    """

    tables: torch.Tensor  # (rows, 2, max_blocks) int32
    lengths: torch.Tensor  # (rows, 2) int32
    unplaced: torch.Tensor  # (rows,) int32
    slots: torch.Tensor  # (tokens,) int64: block * block_size + offset of each token; (0,) if the call writes none
    counts: tuple[int, ...]  # tokens of each row, on the host
    longest: tuple[int, int]  # the longest of each segment, on the host
    causal: bool = True


class PreparedBatch(Protocol):
    """A batch that a kernel set has prepared over a pool: what all layers of the call share is made and checked.

    It serves one call, layer by layer, from one thread.
    """

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store ``key`` and ``value (tokens, kv_heads, head_dim)`` of ``layer`` at the batch's slots."""

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """``softmax(scores) v`` over each row's two segments; ``(tokens, heads, head_dim)``."""


class Kernels(Protocol):
    """A kernel set: how linear layers and paged attention run on this machine."""

    name: str

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation = "none") -> Linear:
        """Bind ``weight (out, in)`` (contiguous) and ``bias (out,)``; ``activation`` is applied to the result."""

    def embedding(self, weight: torch.Tensor, head: Linear | None) -> Embedding:
        """Bind ``weight (vocab, hidden)``. ``head`` is what was bound to the same weight, where anything was."""

    def gated(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> Gated:
        """Bind ``weight (2 * out, in)``, a gate's rows before the others': ``activation(gate) * other``, ``out`` wide.

        (Shazeer 2020, "GLU Variants Improve Transformer".)
        """

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
        """Layer norm: bind ``weight`` and ``bias (hidden,)``."""

    def rms_norm(self, weight: torch.Tensor, eps: float) -> Norm:
        """``x / sqrt(mean(x²) + eps) * weight``: bind ``weight (hidden,)`` (Zhang & Sennrich 2019)."""

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate each pair ``(i, i + head_dim / 2)`` of ``x (tokens, heads, head_dim)`` by its token's angles.

        ``cos`` and ``sin`` are ``(tokens, head_dim / 2)`` (Su et al. 2021, "RoFormer"). ``x`` may be overwritten.
        """

    def top_log_probs(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``count`` greatest of ``log_softmax(logits)``, each row's best first, and their token ids.

        ``logits (rows, vocab)`` float32; ``(rows, count)`` float32 and int64. A row with NaN or +infinity gets no
        finite value.
        """

    def prepare(self, cache: KVCache, batch: PagedBatch, scores: Scores | None = None) -> PreparedBatch:
        """Make what the layers of one call share. The batch's tensors must not change while it is in use.

        Without ``scores`` the scale is ``head_dim ** -0.5``, and there is no bias.
        """


@dataclass(frozen=True)
class PagedAttention:
    """``Attention`` over the block pool: writes the call's keys and values, then attends."""

    sites: Mapping[Site, PreparedBatch]

    def __call__(
        self, site: Site, layer: int, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> torch.Tensor:
        prepared = self.sites[site]
        if key is not None and value is not None:
            prepared.write(layer, key, value)
        return prepared.attend(layer, query)

    def store(self, site: Site, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.sites[site].write(layer, key, value)
