"""The numeric contract in float64: every row of a random mix equals that row alone, token for token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.backbone import Backbone
from server.engine.types import Finished, FinishReason, GenerationRequest
from tests.support.engine import (
    KERNELS,
    Counts,
    Library,
    kernels,
    make_engine,
    oracle,
    random_mix,
    run,
    tiny_backbone,
)

Expected = dict[tuple[object, str], list[tuple[list[int], float | None]]]
HALF = tuple(range(0, 304, 13))  # so many end tokens that most outputs end early


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)


@pytest.fixture(scope="module")
def expected() -> Expected:
    """The oracle's answers, shared by the kernel sets."""
    return {}


def check(
    backbone: Backbone, library: Library, request: GenerationRequest, done: object, expected: Expected, mix: object
) -> None:
    assert isinstance(done, Finished), done
    if request.params.do_sample:
        alone = run(make_engine(backbone, library), [request])[request.request_id]
        assert isinstance(alone, Finished)
        assert done.outputs == alone.outputs
        return
    key = (mix, request.request_id)
    if key not in expected:
        expected[key] = oracle(backbone, library.prefixes[request.prefix] if request.prefix else None, request)
    assert [list(output.token_ids) for output in done.outputs] == [tokens for tokens, _ in expected[key]], request
    for output, (tokens, score) in zip(done.outputs, expected[key], strict=True):
        ended = tokens[-1] in backbone.eos_token_ids
        assert output.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert score is None or output.score == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", range(4))
def test_every_row_of_a_random_mix_equals_the_row_alone(
    backbone: Backbone, expected: Expected, seed: int, name: str
) -> None:
    rng = random.Random(seed)
    library, counts = Library(backbone), Counts()
    requests = random_mix(library, backbone.spec.vocab_size, 24, rng)
    size = rng.choice([8, 16])
    engine = make_engine(
        backbone,
        library,
        blocks=720 // size,  # a fraction of what the mix would like: eviction on the way
        block_size=size,
        max_step_tokens=rng.choice([24, 40, 128]),
        max_rows=24,
        observer=counts,
        kernels=kernels(name, torch.float64),
    )
    ended = run(engine, requests, rng, preempt=0.1)
    for request in requests:
        check(backbone, library, request, ended[request.request_id], expected, seed)
    assert counts.preemptions > 0
    assert counts.evictions > 0


@pytest.mark.parametrize("name", KERNELS)
def test_rows_that_run_out_of_blocks_equal_the_rows_alone(
    backbone: Backbone, expected: Expected, name: str
) -> None:
    """Outputs that outgrow the pool: preemption as it comes, the youngest first, prompt reuse on the way back."""
    rng, library, counts = random.Random(11), Library(backbone), Counts()
    requests = []
    for index in range(18):
        kind: dict[str, Any] = rng.choice([
            {}, {"num_beams": 3}, {"do_sample": True, "seed": index, "num_return_sequences": rng.choice([1, 3])},
        ])
        prompt = [rng.randrange(304) for _ in range(rng.choice([1, 5, 12, 30]))]
        requests.append(library.request(f"n{index}", index % 9, prompt, max_new_tokens=rng.choice([40, 60]), **kind))
    engine = make_engine(
        backbone, library, blocks=110, block_size=4, max_rows=20, max_step_tokens=32, observer=counts,
        kernels=kernels(name, torch.float64),
    )
    ended = run(engine, requests, rng)
    for request in requests:
        check(backbone, library, request, ended[request.request_id], expected, "natural")
    assert counts.preemptions > 2
    assert counts.evictions > 0


def beam_mix(library: Library, rng: random.Random, vocab: int, window: int) -> list[GenerationRequest]:
    requests = []
    for index in range(20):
        beams = rng.choice([2, 3, 5])
        params: dict[str, Any] = {
            "num_beams": beams,
            "num_return_sequences": rng.choice([1, beams]),
            "max_new_tokens": rng.choice([1, 2, 20, 40]),
            "length_penalty": rng.choice([-3.0, -0.5, 0.0, 1.0, 2.0, 20.0]),
            "early_stopping": rng.choice([False, True, "never"]),
            "repetition_penalty": rng.choice([1.0, 1.0, 1.5]),
            "no_repeat_ngram_size": rng.choice([0, 0, 2]),
        }
        params["min_new_tokens"] = min(rng.choice([0, 0, 5, 40]), params["max_new_tokens"])
        task = rng.randrange(len(library.keys))
        prefix = library.keys[task]
        length = library.prefixes[prefix].spec.length("decoder") if prefix else 0
        prompt = rng.choice([1, 7, 16, 30, window - length - rng.choice([1, 2, 10])])
        requests.append(library.request(f"b{index}", task, [rng.randrange(vocab) for _ in range(prompt)], **params))
    return requests


@pytest.mark.parametrize("eos", [0, list(HALF)], ids=["one end token", "many end tokens"])
@pytest.mark.parametrize("seed", range(2))
def test_beams_equal_transformers_under_every_stopping_rule(
    tmp_path: Path, seed: int, eos: int | list[int]
) -> None:
    """Outputs that end early, several end tokens, penalties of either sign, and prompts that nearly fill the window."""
    backbone = tiny_backbone(tmp_path, torch.float64, eos_token_id=eos, n_positions=160)
    rng = random.Random(seed)
    library, counts = Library(backbone), Counts()
    requests = beam_mix(library, rng, backbone.spec.vocab_size, 160)
    engine = make_engine(
        backbone, library, blocks=100, block_size=8, max_rows=20, max_step_tokens=64, observer=counts
    )
    ended = run(engine, requests, rng, preempt=0.2)
    for request in requests:
        check(backbone, library, request, ended[request.request_id], {}, seed)
    assert counts.preemptions > 0


def test_beams_equal_transformers_for_every_stopping_rule_and_length_penalty(tmp_path: Path) -> None:
    """Outputs of 1 to 12 tokens among many end tokens: when the search stops decides what is found."""
    backbone = tiny_backbone(tmp_path, torch.float64, eos_token_id=list(HALF), n_positions=160)
    library, rng = Library(backbone), random.Random(0)
    requests: list[GenerationRequest] = []
    for rule in (False, True, "never"):
        for penalty in (-2.0, -1.0, -0.3, 0.0, 0.5, 1.0, 3.0):
            for _ in range(2):
                requests.append(library.request(
                    f"{rule} {penalty} {len(requests)}", rng.randrange(3), [rng.randrange(304)], num_beams=3,
                    num_return_sequences=3, max_new_tokens=12, length_penalty=penalty, early_stopping=rule,
                ))
    ended = run(make_engine(backbone, library, max_rows=60), requests)
    for request in requests:
        check(backbone, library, request, ended[request.request_id], {}, "rules")


def test_greedy_with_several_end_tokens_stops_at_the_first_of_them(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float64, eos_token_id=list(HALF))
    library, rng = Library(backbone), random.Random(0)
    requests = [
        library.request(f"g{i}", i % 9, [rng.randrange(304) for _ in range(9)], max_new_tokens=40,
                        min_new_tokens=rng.choice([0, 15]))
        for i in range(18)
    ]
    ended = run(make_engine(backbone, library, max_rows=18), requests, rng)
    for request in requests:
        check(backbone, library, request, ended[request.request_id], {}, "greedy")
    reasons = [done.outputs[0].finish_reason for done in ended.values() if isinstance(done, Finished)]
    assert reasons.count(FinishReason.STOP) > 9
