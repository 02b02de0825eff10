"""What ``--deterministic`` promises: every bit of a request is that of its solo run, whatever runs beside it."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixes.backbone import Backbone
from server.engine.kernels import select_kernels
from server.engine.kernels.base import Kernels, Quantization
from server.engine.types import Finished, GenerationRequest, Output
from tests.support.bart import tiny_bart
from tests.support.bart_library import BartLibrary
from tests.support.engine import Counts, Library, LogitsRecorder, make_engine, random_params, run, tiny_backbone

Solo = tuple[tuple[Output, ...], dict[tuple[int, ...], torch.Tensor]]
# Widths that are no multiple of a vector, a middle layer that is summed in two parts, several chunks of outputs.
GPT2 = {"n_embd": 66, "n_head": 3, "n_inner": 1100}
ARITHMETIC: dict[str, tuple[torch.dtype, Quantization]] = {
    "fp32": (torch.float32, "none"), "fp64": (torch.float64, "none"), "int8": (torch.float32, "int8"),
}  # fmt: skip
BART = {"d_model": 44, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 1100}


@dataclass(frozen=True)
class World:
    """A backbone, its tasks, and each request's solo run, made when it is first asked for."""

    backbone: Backbone
    library: Library
    kernels: Callable[[int], Kernels]
    alone: dict[tuple[int, str], Solo]

    def solo(self, seed: int, request: GenerationRequest) -> Solo:
        """The run with an engine of its own, one thread, whole prompts."""
        key = seed, request.request_id
        if key not in self.alone:
            engine = make_engine(
                self.backbone, self.library, blocks=900, max_step_tokens=4096, max_step_ms=1e9, reuse_prompts=False,
                deterministic=True, kernels=self.kernels(1),
            )  # fmt: skip
            self.alone[key] = self.run(engine, [request])[request.request_id]
        return self.alone[key]

    def run(self, engine: Any, requests: list[GenerationRequest], *arguments: Any, **options: Any) -> dict[str, Solo]:
        """Outputs and logits of every request."""
        recorder = LogitsRecorder(engine)
        ended = run(engine, requests, *arguments, **options)
        engine.close()
        found = {}
        for name, done in ended.items():
            assert isinstance(done, Finished), done
            found[name] = done.outputs, recorder.logits[name]
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], World]]:
    made: list[Kernels] = []

    @functools.cache
    def make_kernels(arithmetic: str, threads: int) -> Kernels:
        dtype, quantize = ARITHMETIC[arithmetic]
        made.append(select_kernels("cpu", dtype, threads=threads, deterministic=True, quantize=quantize))
        return made[-1]

    @functools.cache
    def make(family: str, arithmetic: str) -> World:
        folder, dtype = tmp_path_factory.mktemp(family), ARITHMETIC[arithmetic][0]
        if family == "gpt2":
            backbone = tiny_backbone(folder, dtype, **GPT2)
            library = Library(backbone)
        else:
            backbone = tiny_bart(folder, dtype, window=512, **BART)
            library = BartLibrary(backbone)
        return World(backbone, library, functools.partial(make_kernels, arithmetic), {})

    yield make
    for kernels in made:
        kernels.close()  # type: ignore[attr-defined]


def mix(world: World, rng: random.Random) -> list[GenerationRequest]:
    """Requests of all kinds over few tasks. Many begin with the same tokens, some repeat a whole prompt."""
    vocab, head = 300, [rng.randrange(300) for _ in range(64)]
    prompts: list[list[int]] = []
    requests = []
    for index in range(22):
        if prompts and rng.random() < 0.3:
            prompt = rng.choice(prompts)
        else:
            tail = [rng.randrange(vocab) for _ in range(rng.choice([1, 3, 16, 40, 90]))]
            prompt = head[: rng.choice([0, 0, 16, 33, 64])] + tail
        prompts.append(prompt)
        params = random_params(rng) | {"max_new_tokens": rng.choice([1, 5, 24])}
        params["min_new_tokens"] = min(params["min_new_tokens"], params["max_new_tokens"])
        if params.get("num_beams", 1) == 1:
            params["logprobs"] = rng.choice([None, 3])
        requests.append(world.library.request(f"r{index}", rng.choice([0, 1, 4, 5, 7]), prompt, **params))
    return requests


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("seed", range(2))
def test_every_bit_of_a_request_is_that_of_its_solo_run(
    world: Callable[[str, str], World], family: str, arithmetic: str, threads: int, seed: int
) -> None:
    """Logits, scores and tokens: chunks of all sizes, preemption, eviction, reused prompts, inputs encoded together."""
    rng, here = random.Random(f"{family} {seed} {threads}"), world(family, arithmetic)
    size = rng.choice([4, 8, 16])
    requests, counts = mix(here, random.Random(f"{family} {seed}")), Counts()
    engine = make_engine(
        here.backbone, here.library, blocks=900 // size, block_size=size, max_rows=rng.choice([16, 32]),
        max_step_tokens=rng.choice([32, 60, 200]), max_step_ms=rng.choice([1e-4, 1.0, 1e6]),
        max_encoder_tokens=rng.choice([60, 2000]), deterministic=True, observer=counts, kernels=here.kernels(threads),
    )  # fmt: skip
    compared = 0
    found = here.run(engine, requests, rng, preempt=0.1)
    for request in requests:
        (outputs, logits), (alone, expected) = found[request.request_id], here.solo(seed, request)
        assert logits.keys() == expected.keys(), request
        for tokens, values in logits.items():
            assert torch.equal(values, expected[tokens]), (request, len(tokens))
            compared += 1
        assert outputs == alone, request
    assert compared > 150
    assert counts.preemptions > 0
    assert max(rows for rows, _, _ in counts.steps) > 4


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_chunks_depend_on_no_clock(
    world: Callable[[str, str], World], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same requests in the same order make the same steps, on a clock that stands as on one that races."""
    here = world(family, "fp32")
    steps = []
    for tick in (0.0, 1e3):
        now = itertools.count()
        clock = SimpleNamespace(monotonic=lambda now=now, tick=tick: next(now) * tick)
        monkeypatch.setattr("server.engine.runner.time", clock)
        counts = Counts()
        engine = make_engine(
            here.backbone, here.library, blocks=200, max_step_ms=0.1, max_step_tokens=60, max_rows=32,
            deterministic=True, observer=counts, kernels=here.kernels(2),
        )  # fmt: skip
        run(engine, mix(here, random.Random(family)), random.Random(family))
        engine.close()
        steps.append((counts.steps, counts.forwards))
    assert steps[0] == steps[1]
