"""Rows to logits: the one place that calls the model for serving.

Owns the block pool's tensors, the model, its calls and their count; knows no requests beyond the rows it is given.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from prefixes.spec import PrefixSpec, Site
from server.engine.batch import BatchBuilder
from server.engine.config import EngineConfig
from server.engine.kernels.base import Kernels, KVCache, PagedAttention
from server.engine.models import load_model
from server.engine.prefixes.entry import SiteBlocks
from server.engine.row import EncodedInput, Group
from server.engine.scheduling.encoding import EncoderWork
from server.engine.scheduling.plan import ScheduledRow, StepPlan

log = logging.getLogger(__name__)


@dataclass
class StepResult:
    """What a plan's calls gave. A call that failed leaves its error instead.

    ``logits (n, vocab)`` float32 are those of the rows that want them, in order. ``calls`` counts by stage. Seconds are
    what a call took, None if there was none or it failed.
    """

    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    encoder_seconds: float | None = None
    decoder_seconds: float | None = None
    encoder_error: Exception | None = None
    decoder_error: Exception | None = None
    calls: dict[str, int] = field(default_factory=dict)


class Runner:
    """One backbone's model over one pool of blocks."""

    def __init__(self, backbone: Backbone, kernels: Kernels, config: EngineConfig) -> None:
        weight = next(backbone.model.parameters())
        sites = backbone.spec.sites
        self._device, self._dtype, self._block_size = weight.device, weight.dtype, config.block_size
        self._model, self._kernels = load_model(backbone, kernels), kernels
        self._encoder, self.decoder_layers = self._model.encoder, len(self._model.layers)
        self.encoder_layers, self.encoder_units = (len(e.layers), e.units) if (e := self._encoder) else (0, 0)
        self._layers: dict[Site, int] = {name: site.layers for name, site in sites.items()}
        layers, geometry = max(self._layers.values()), sites["decoder"]
        per_token = 2 * layers * geometry.kv_heads * geometry.head_dim * self._dtype.itemsize
        self.bytes_per_block = per_token * config.block_size
        self.blocks = config.kv_cache_bytes // self.bytes_per_block
        shape = (layers, max(self.blocks, 2), geometry.kv_heads, config.block_size, geometry.head_dim)
        self._cache = KVCache(self._pool(shape), self._pool(shape))
        self._build = BatchBuilder(config.block_size, self._device)
        # The last encoder call: its inputs, and what their next unit takes.
        self._underway: tuple[tuple[EncodedInput, ...], torch.Tensor] | None = None
        self.forwards: Counter[str] = Counter()

    def write_prefix(self, prefix: Prefix, blocks: SiteBlocks) -> None:
        """Write ``prefix``, cast to the backbone's dtype, into its blocks."""
        for site, taken in blocks.items():
            for name, pool in (("key", self._cache.keys), ("value", self._cache.values)):
                tensor = prefix.tensors[f"{site}.{name}"].to(self._device, self._dtype)  # (layers, length, heads, dim)
                for index, block in enumerate(taken):
                    part = tensor[:, index * self._block_size : (index + 1) * self._block_size]
                    pool[: part.shape[0], block, :, : part.shape[1]] = part.transpose(1, 2)

    def read_prefix(self, spec: PrefixSpec, blocks: SiteBlocks) -> Prefix:
        """The prefix of ``spec`` that ``write_prefix`` wrote, in the backbone's dtype, copied to host memory."""
        tensors = {}
        for site, taken in blocks.items():
            layers, length = self._layers[site], spec.length(site)
            for name, pool in (("key", self._cache.keys), ("value", self._cache.values)):
                held = pool[:layers, list(taken)].to("cpu").transpose(2, 3)  # (layers, blocks, size, heads, dim)
                tensors[f"{site}.{name}"] = held.flatten(1, 2)[:, :length].contiguous()
        return Prefix(spec, tensors)

    def run(self, plan: StepPlan) -> StepResult:
        """Run the plan: at most one call for each stage."""
        result, before = StepResult(), Counter(self.forwards)
        if plan.encode is None:
            self.forget_encoding()
        else:
            try:
                began = time.monotonic()
                self.encode(plan.encode)
                result.encoder_seconds = self._since(began)
            except Exception as error:
                _log_failure("an encoder call failed; its %d requests end with an error", plan.encode.groups)
                result.encoder_error = error
        if plan.rows:
            try:
                self.copy_blocks(plan.copies)
                began = time.monotonic()
                result.logits = self.decoder(plan.rows)
                result.decoder_seconds = self._since(began)
            except Exception as error:
                _log_failure("a step failed; its %d rows end with an error", [row.group for row in plan.rows])
                result.decoder_error = error
        result.calls = dict(self.forwards - before)
        return result

    def forget_encoding(self) -> None:
        """Give up what the encoder's last call left: no input is between two of its calls."""
        self._underway = None

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy each source block to its target, all layers."""
        if copies:
            sources, targets = (list(blocks) for blocks in zip(*copies, strict=True))
            for pool in (self._cache.keys, self._cache.values):
                pool[:, targets] = pool[:, sources]

    @torch.inference_mode()
    def encode(self, work: EncoderWork) -> None:
        """One call of the encoder: run ``work.units`` over its inputs, and keep in each what its next unit takes."""
        assert self._encoder is not None, "only encoder-decoders have inputs to encode"
        self.forwards["encoder"] += 1
        batch = self._build.encoder(work)
        if work.units.start == 0:
            hidden = self._encoder.embed(*self._build.encoder_tokens(work))
        else:
            hidden = self._joined(work)
            assert hidden.shape[0] == work.tokens, "an input has lost what its next unit takes"
        prepared = self._kernels.prepare(self._cache, batch, self._model.scores.get("encoder"))
        attention = PagedAttention({"encoder": prepared, "cross": prepared})
        hidden = self._encoder.advance(hidden, work.units, attention)
        ended = work.units.stop == self.encoder_units
        self._underway = None if ended else (work.inputs, hidden)
        for encoded, part in zip(work.inputs, hidden.split(batch.counts), strict=True):
            encoded.hidden = None if ended else part

    def _joined(self, work: EncoderWork) -> torch.Tensor:
        """What the inputs' next units take: the last call's own tensor if its inputs are the same, else a copy."""
        if self._underway and self._underway[0] == work.inputs:
            return self._underway[1]
        return torch.cat([encoded.hidden for encoded in work.inputs if encoded.hidden is not None])

    @torch.inference_mode()
    def decoder(self, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        """One call of the decoder over ``rows``; float32 logits ``(n, vocab)`` of those that want them, in order."""
        self.forwards["decoder"] += 1
        call = self._build.decoder(rows)
        scores = self._model.scores
        contexts = {s: self._kernels.prepare(self._cache, batch, scores.get(s)) for s, batch in call.batches.items()}
        attention = self._model.attention(call.positions, PagedAttention(contexts))
        hidden = self._model.embed(call.tokens, call.positions)
        for layer in self._model.layers:
            hidden = layer(hidden, attention)
        return self._model.logits(hidden if call.wanted is None else hidden[call.wanted]).float()

    def _since(self, began: float) -> float:
        """Seconds since ``began`` until the calls so far are through: the budget needs what they really take."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic() - began

    def _pool(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeros. On a CPU the system maps them when they are first touched: an idle server takes only what it uses."""
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        untouched = np.zeros(math.prod(shape) * self._dtype.itemsize, np.uint8)
        return torch.from_numpy(untouched).view(self._dtype).view(shape)


def _log_failure(message: str, groups: Sequence[Group]) -> None:
    ids = list(dict.fromkeys(group.request.request_id for group in groups))
    log.exception(message, len(groups), extra={"facts": {"request_ids": ids}})
