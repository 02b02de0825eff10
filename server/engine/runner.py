"""Rows to tensors to logits: the one place that calls the model for serving.

Owns the block pool's tensors, the model and the count of forward calls; knows no requests beyond the rows it is given.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from prefixes.spec import Site
from server.engine.batch import RowContext, Tables
from server.engine.config import EngineConfig
from server.engine.kernels.base import Kernels, KVCache, PagedAttention, PagedBatch
from server.engine.models import load_model
from server.engine.prefixes.store import SiteBlocks
from server.engine.row import EncodedInput
from server.engine.scheduling.encoding import EncoderWork
from server.engine.scheduling.scheduler import ScheduledRow


class Runner:
    """One backbone's model over one pool of blocks."""

    def __init__(self, backbone: Backbone, kernels: Kernels, config: EngineConfig) -> None:
        weight = next(backbone.model.parameters())
        sites = backbone.spec.sites
        self._device, self._dtype, self._block_size = weight.device, weight.dtype, config.block_size
        self._model, self._kernels = load_model(backbone, kernels), kernels
        self._encoder = self._model.encoder
        self.encoder_layers, self.encoder_units = (e.layers, e.units) if (e := self._encoder) else (0, 0)
        layers, geometry = max(site.layers for site in sites.values()), sites["decoder"]
        per_token = 2 * layers * geometry.kv_heads * geometry.head_dim * self._dtype.itemsize
        self.bytes_per_block = per_token * config.block_size
        self.blocks = config.kv_cache_bytes // self.bytes_per_block
        shape = (layers, max(self.blocks, 2), geometry.kv_heads, config.block_size, geometry.head_dim)
        self._cache = KVCache(self._pool(shape), self._pool(shape))
        self._tables = Tables(config.block_size, self._device)
        self._underway: tuple[tuple[EncodedInput, ...], torch.Tensor] | None = None  # inputs that the encoder is at
        self.forwards: Counter[str] = Counter()

    def write_prefix(self, prefix: Prefix, blocks: SiteBlocks) -> None:
        """Write ``prefix``, cast to the backbone's dtype, into its blocks."""
        for site, taken in blocks.items():
            for name, pool in (("key", self._cache.keys), ("value", self._cache.values)):
                tensor = prefix.tensors[f"{site}.{name}"].to(self._device, self._dtype)  # (layers, length, heads, dim)
                for index, block in enumerate(taken):
                    part = tensor[:, index * self._block_size : (index + 1) * self._block_size]
                    pool[: part.shape[0], block, :, : part.shape[1]] = part.transpose(1, 2)

    def forget_encoding(self) -> None:
        """No input is under way any more: keep nothing of the last one."""
        self._underway = None

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy each source block to its target, all layers."""
        if copies:
            sources, targets = (list(blocks) for blocks in zip(*copies, strict=True))
            for pool in (self._cache.keys, self._cache.values):
                pool[:, targets] = pool[:, sources]

    @torch.inference_mode()
    def encode(self, work: EncoderWork) -> float:
        """One call of the encoder: ``work.units`` over its inputs, which keep what the next units take. Seconds taken.

        An input's blocks hold the keys and values of the encoder's current layer until cross-attention's take their
        place; both are written at the same slots.
        """
        assert self._encoder is not None, "only encoder-decoders have inputs to encode"
        began = time.monotonic()
        self.forwards["encoder"] += 1
        contexts = []
        for group, encoded in zip(work.groups, work.inputs, strict=True):
            length = len(encoded.token_ids)
            prefix = (group.prefix_blocks.get("encoder", ()), group.prefix_length("encoder"))
            contexts.append(RowContext(length, *prefix, encoded.blocks, length))
        batch = self._tables.batch(contexts, causal=False)
        if work.units.start == 0:
            ids = [token for encoded in work.inputs for token in encoded.token_ids]
            offsets = [group.position_offset("encoder") for group in work.groups]
            lengths = [len(encoded.token_ids) for encoded in work.inputs]
            positions = [np.arange(o, o + n) for o, n in zip(offsets, lengths, strict=True)]
            tokens, places = (self._tables.tensor(array) for array in (np.array(ids), np.concatenate(positions)))
            hidden = self._encoder.embed(tokens, places)
        else:
            hidden = self._joined(work)
            assert hidden.shape[0] == work.tokens, "an input has lost what its next unit takes"
        prepared = self._kernels.prepare(self._cache, batch)
        attention = PagedAttention({"encoder": prepared, "cross": prepared})
        hidden = self._encoder.advance(hidden, work.units, attention)
        ended = work.units.stop == self.encoder_units
        self._underway = None if ended else (work.inputs, hidden)
        for encoded, part in zip(work.inputs, hidden.split(batch.counts), strict=True):
            encoded.hidden = None if ended else part
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the pace is kept by what a call really takes
        return time.monotonic() - began

    def _joined(self, work: EncoderWork) -> torch.Tensor:
        """What the inputs' next units take: as the last call left it, where nobody has left the cohort since."""
        if self._underway and self._underway[0] == work.inputs:
            return self._underway[1]
        return torch.cat([encoded.hidden for encoded in work.inputs if encoded.hidden is not None])

    @torch.inference_mode()
    def decoder(self, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        """One call of the decoder over ``rows``; float32 logits ``(n, vocab)`` of those that want them, in order."""
        self.forwards["decoder"] += 1
        tokens, positions, own = self._tokens(rows)
        batches: dict[Site, PagedBatch] = {"decoder": self._tables.batch(own, causal=True)}
        if self._encoder:
            batches["cross"] = self._tables.batch(self._cross(rows), causal=False, writes=False)
        prepared = {site: self._kernels.prepare(self._cache, batch) for site, batch in batches.items()}
        hidden = self._model.decoder(tokens, positions, PagedAttention(prepared))
        ends = itertools.accumulate(row.count for row in rows)
        last = [end - 1 for end, row in zip(ends, rows, strict=True) if row.wants_logits]
        if not last:
            return hidden.new_empty((0, 0), dtype=torch.float32)
        wanted = hidden if len(last) == hidden.shape[0] else hidden[torch.tensor(last, device=self._device)]
        return self._model.logits(wanted).float()

    def _tokens(self, rows: Sequence[ScheduledRow]) -> tuple[torch.Tensor, torch.Tensor, list[RowContext]]:
        """The rows' tokens and positions, flattened, and what each row attends to of its own."""
        total = sum(row.count for row in rows)
        tokens, positions = np.empty(total, np.int64), np.empty(total, np.int64)
        contexts, begin = [], 0
        for row in rows:
            group, sequence, end = row.group, row.sequence, row.start + row.count
            part, offset = slice(begin, begin + row.count), group.position_offset("decoder")
            tokens[part] = sequence.token_ids[row.start : end]
            positions[part] = np.arange(row.start + offset, end + offset)
            prefix = (group.prefix_blocks.get("decoder", ()), group.prefix_length("decoder"))
            contexts.append(RowContext(row.count, *prefix, sequence.blocks, end))
            begin += row.count
        return self._tables.tensor(tokens), self._tables.tensor(positions), contexts

    def _cross(self, rows: Sequence[ScheduledRow]) -> list[RowContext]:
        """What rows attend to of their inputs; rows of one group stand together, so that its input is read once."""
        contexts = []
        for group, members in itertools.groupby(rows, key=lambda row: row.group):
            assert group.input is not None and group.input.complete
            prefix = (group.prefix_blocks.get("cross", ()), group.prefix_length("cross"))
            count = sum(row.count for row in members)
            contexts.append(RowContext(count, *prefix, group.input.blocks, len(group.input.token_ids)))
        return contexts

    def _pool(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeros. On a CPU such as are mapped when they are first touched, so that an idle server takes what it uses."""
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        untouched = np.zeros(math.prod(shape) * self._dtype.itemsize, np.uint8)
        return torch.from_numpy(untouched).view(self._dtype).view(shape)
