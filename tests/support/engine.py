"""Makes engines over tiny random backbones, random mixes of requests, and the oracles to compare them with."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.spec import Positions
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kernels import select_kernels
from server.engine.kernels.base import Kernels
from server.engine.kernels.torch_reference import TorchKernels
from server.engine.observer import SilentObserver
from server.engine.scheduling.plan import ScheduledRow
from server.engine.types import Event, Failed, Finished, GenerationRequest, PrefixKey, SamplingParams, TokenEvent
from tests.support.prefixes import make_prefix, save_tiny_gpt2

PREFIX_LENGTHS = (0, 1, 5, 16, 17, 100, 33, 2, 64)  # 0 is the bare backbone


KERNELS = ("torch", "numba")


@functools.cache
def kernels(name: str, dtype: torch.dtype) -> Kernels:
    """One kernel set per name and dtype for the whole run: numba's has threads of its own."""
    return select_kernels("cpu", dtype, name, threads=2)


def tiny_backbone(folder: Path, dtype: torch.dtype = torch.float64, **config: Any) -> Backbone:
    """A random GPT-2 with a window of 320; all sizes small, weights large enough that every part matters."""
    save_tiny_gpt2(folder, **{"n_positions": 320, **config})
    return load_backbone(str(folder), dtype=dtype)


@dataclass
class Counts(SilentObserver):
    """Counts what the engine reports."""

    preemptions: int = 0
    evictions: int = 0
    steps: list[tuple[int, int, int]] = field(default_factory=list)  # rows, tasks, tokens
    forwards: list[dict[str, int]] = field(default_factory=list)

    def on_preemption(self) -> None:
        self.preemptions += 1

    def on_prefix_evicted(self, nbytes: int) -> None:
        self.evictions += 1

    def on_step(self, rows: int, tasks: int, tokens: int, seconds: float, forwards: Mapping[str, int]) -> None:
        self.steps.append((rows, tasks, tokens))
        self.forwards.append(dict(forwards))


class Library:
    """Random prefixes by task index, and the loader that an engine fetches them with."""

    def __init__(
        self,
        backbone: Backbone,
        lengths: Iterable[int] = PREFIX_LENGTHS,
        scale: float = 1.0,
        positions: Positions = "shifted",
        make: Callable[[int, int], Prefix] | None = None,
    ) -> None:
        """``make`` gives the prefix of a task's index and length; the decoder's at ``positions`` where it is None."""
        self.prefixes: dict[PrefixKey, Prefix] = {}
        self.keys: list[PrefixKey | None] = []
        for index, length in enumerate(lengths):
            key = PrefixKey("default", f"sha256:{index:064x}") if length else None
            self.keys.append(key)
            if key:
                prefix = make(index, length) if make else make_prefix(
                    backbone.spec, length=length, seed=index, positions=positions
                )
                self.prefixes[key] = Prefix(prefix.spec, {n: t * scale for n, t in prefix.tensors.items()})
        self.loads = 0

    def load(self, key: PrefixKey) -> Prefix:
        self.loads += 1
        return self.prefixes[key]

    def request(
        self, name: str, task: int, token_ids: Iterable[int], **params: Any
    ) -> GenerationRequest:
        """A request of task number ``task``."""
        key = self.keys[task]
        spec = self.prefixes[key].spec if key else None
        return GenerationRequest(
            name, "default", tuple(token_ids), SamplingParams(**params), key, spec, task=f"default/{task}"
        )


def make_engine(
    backbone: Backbone,
    library: Library,
    *,
    blocks: int = 400,
    kernels: Kernels | None = None,
    observer: SilentObserver | None = None,
    **config: Any,
) -> Engine:
    """An engine with a pool of ``blocks``, of which prefixes may take ``max_prefix_blocks``."""
    size = config.pop("block_size", 16)
    geometry = backbone.spec.sites["decoder"]
    layers = max(site.layers for site in backbone.spec.sites.values())
    per_block = 2 * layers * geometry.kv_heads * geometry.head_dim * size * backbone.model.dtype.itemsize
    if "max_prefix_blocks" in config:
        config["max_prefix_bytes"] = config.pop("max_prefix_blocks") * per_block
    settings = EngineConfig(kv_cache_bytes=blocks * per_block, block_size=size, **config)
    return Engine(backbone, kernels or TorchKernels(), settings, library.load, observer)


class LogitsRecorder:
    """Keeps the logits of every choice that an engine makes, by request and the tokens they were computed behind."""

    def __init__(self, engine: Engine) -> None:
        self.logits: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
        self._decoder = engine._runner.decoder
        engine._runner.decoder = self._record  # type: ignore[method-assign]

    def _record(self, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        logits = self._decoder(rows)
        wanting = [row for row in rows if row.wants_logits]
        for row, values in zip(wanting, logits, strict=True):
            found = self.logits.setdefault(row.group.request.request_id, {})
            found[tuple(row.row.token_ids)] = values.clone()
        return logits


def run(
    engine: Engine,
    requests: Iterable[GenerationRequest],
    rng: random.Random | None = None,
    events: list[Event] | None = None,
    preempt: float = 0.0,
) -> dict[str, Finished | Failed]:
    """Run to the end; with ``rng``, requests arrive while others run. Checks the ledger when idle.

    ``preempt`` is the probability, before each step, that a random running group is preempted whatever its age. Each
    step waits for the loads under way, so that a run is the same each time.
    """
    waiting, ended = list(requests), {}
    while waiting or engine.requests:
        while waiting and (rng is None or not engine.requests or rng.random() < 0.4):
            request = waiting.pop(0)
            engine.check(request)
            engine.add(request)
        if rng and rng.random() < preempt and engine._scheduler.running:
            engine._scheduler.preempt(rng.choice(engine._scheduler.running))
        wait_for_loads(engine)
        for event in engine.step():
            if events is not None:
                events.append(event)
            if isinstance(event, Finished | Failed):
                assert event.request_id not in ended, "two terminal events"
                ended[event.request_id] = event
    engine.check_integrity()
    return ended


def wait_for_loads(engine: Engine) -> None:
    """Return once no load is under way and none may begin."""
    loader = engine._prefixes._loader
    with loader._lock:
        assert loader._lock.wait_for(lambda: not loader._running and not loader._startable(), timeout=60)


def joined_text(events: Iterable[Event], request_id: str, index: int = 0) -> str:
    """The text of an output as streamed."""
    return "".join(
        e.text for e in events if isinstance(e, TokenEvent) and e.request_id == request_id and e.index == index
    )


def random_params(rng: random.Random) -> dict[str, Any]:
    """Greedy, sampled or beam search, with random penalties and limits."""
    params: dict[str, Any] = {"max_new_tokens": rng.choice([1, 3, 12, 50])}
    kind = rng.choice(["greedy", "sample", "beam"])
    if kind == "sample":
        params |= {"do_sample": True, "seed": rng.randrange(1000), "temperature": rng.choice([0.7, 1.0, 1.5])}
        params |= {"top_k": rng.choice([0, 5, 50]), "top_p": rng.choice([1.0, 0.8])}
        params["num_return_sequences"] = rng.choice([1, 1, 3])
    elif kind == "beam":
        params["num_beams"] = rng.choice([2, 4])
        params["num_return_sequences"] = rng.choice([1, 2])
        params["length_penalty"] = rng.choice([1.0, 0.0, -0.5, 2.0])
        params["early_stopping"] = rng.choice([False, True, "never"])
    params["repetition_penalty"] = rng.choice([1.0, 1.0, 1.3])
    params["no_repeat_ngram_size"] = rng.choice([0, 0, 2, 3])
    params["min_new_tokens"] = min(rng.choice([0, 6, 50]), params["max_new_tokens"])
    return params


def random_mix(library: Library, vocab: int, rows: int, rng: random.Random) -> list[GenerationRequest]:
    """Requests over all tasks, with prompts of 1 to 150 tokens."""
    tasks = [index % len(library.keys) for index in range(rows)]
    rng.shuffle(tasks)
    return [
        library.request(
            f"r{index}",
            task,
            [rng.randrange(vocab) for _ in range(rng.choice([1, 2, 15, 16, 17, 40, 150]))],
            **random_params(rng),
        )
        for index, task in enumerate(tasks)
    ]


def prefix_cache(backbone: Backbone, prefix: Prefix | None, rows: int = 1) -> DynamicCache:
    """transformers' cache holding ``prefix``, expanded for ``rows``."""
    cache = DynamicCache(config=backbone.model.config)
    if prefix:
        dtype = backbone.model.dtype
        keys, values = prefix.tensors["decoder.key"], prefix.tensors["decoder.value"]
        for layer in range(keys.shape[0]):
            k, v = (
                t[layer].to(backbone.model.device, dtype).transpose(0, 1)[None].expand(rows, -1, -1, -1)
                for t in (keys, values)
            )
            cache.update(k.contiguous(), v.contiguous(), layer)
    return cache


@torch.inference_mode()
def oracle_logits(backbone: Backbone, prefix: Prefix | None, token_ids: Sequence[int]) -> torch.Tensor:
    """transformers' logits ``(tokens, vocab)`` behind each of ``token_ids``, positions counted as the prefix says."""
    offset = prefix.spec.position_offset("decoder") if prefix else 0
    length = prefix.spec.length("decoder") if prefix else 0
    logits: torch.Tensor = backbone.model(
        torch.tensor([list(token_ids)], device=backbone.model.device),
        attention_mask=torch.ones(1, length + len(token_ids), dtype=torch.long, device=backbone.model.device),
        position_ids=torch.arange(offset, offset + len(token_ids), device=backbone.model.device)[None],
        past_key_values=prefix_cache(backbone, prefix),
    ).logits[0]
    return logits


@torch.inference_mode()
def generate(backbone: Backbone, prefix: Prefix | None, request: GenerationRequest) -> Any:
    """transformers' ``generate`` on this request alone, greedy or beam search, with its processed scores."""
    params, length = request.params, len(request.token_ids)
    offset = prefix.tensors["decoder.key"].shape[1] if prefix else 0
    config = copy.deepcopy(backbone.model.generation_config)
    config.update(
        max_new_tokens=min(params.max_new_tokens, backbone.spec.max_positions - offset - length),
        min_new_tokens=params.min_new_tokens or None,
        do_sample=False,
        num_beams=params.num_beams,
        num_return_sequences=params.num_return_sequences,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        repetition_penalty=params.repetition_penalty,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        pad_token_id=(*backbone.eos_token_ids, 0)[0],
        output_scores=True,
        return_dict_in_generate=True,
    )
    return backbone.model.generate(
        torch.tensor([request.token_ids]),
        attention_mask=torch.ones(1, offset + length, dtype=torch.long),
        past_key_values=prefix_cache(backbone, prefix, params.num_beams),
        generation_config=config,
    )


def oracle(
    backbone: Backbone, prefix: Prefix | None, request: GenerationRequest
) -> list[tuple[list[int], float | None]]:
    """``generate``'s tokens up to the first end token, and scores for beams."""
    out = generate(backbone, prefix, request)
    scores = out.sequences_scores.tolist() if request.params.num_beams > 1 else [None]
    results = []
    for sequence, score in zip(out.sequences, scores, strict=True):
        tokens = sequence[len(request.token_ids) :].tolist()
        for position, token in enumerate(tokens):
            if token in backbone.eos_token_ids:
                tokens = tokens[: position + 1]
                break
        results.append((tokens, score))
    return results
