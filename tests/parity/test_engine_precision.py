"""The numeric contract below float64: logits within the bound, tokens equal wherever the oracle's choice is clear."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from server.engine.types import Finished, GenerationRequest
from tests.support.engine import (
    KERNELS,
    Counts,
    Library,
    LogitsRecorder,
    generate,
    kernels,
    make_engine,
    oracle,
    oracle_logits,
    random_mix,
    run,
    tiny_backbone,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backbone")


def bound(logits: torch.Tensor) -> float:
    return max(1e-4, 1e-5 * float(logits.abs().max()))


def lineages(recorded: Mapping[tuple[int, ...], torch.Tensor]) -> list[list[tuple[int, ...]]]:
    """The recorded contexts in families: each is a beginning of its family's first."""
    families: list[list[tuple[int, ...]]] = []
    for context in sorted(recorded, key=len, reverse=True):
        family = next((f for f in families if f[0][: len(context)] == context), None)
        if family is None:
            families.append([context])
        else:
            family.append(context)
    return families


def logits_pairs(
    backbone: Backbone, prefix: Prefix | None, recorded: Mapping[tuple[int, ...], torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The engine's logits and the oracle's on the same tokens (the engine's own, forced on the oracle)."""
    pairs = []
    for family in lineages(recorded):
        whole = oracle_logits(backbone, prefix, family[0])
        pairs += [(recorded[context], whole[len(context) - 1]) for context in family]
    return pairs


def check_greedy(backbone: Backbone, library: Library, request: GenerationRequest, got: list[int],
                 engine_settings: dict[str, Any]) -> None:
    """Tokens are equal up to the first that is not clear; behind it on the oracle's tokens."""
    prefix = library.prefixes[request.prefix] if request.prefix else None
    [(expected, _)] = oracle(backbone, prefix, request)
    scores = [step[0] for step in generate(backbone, prefix, request).scores][: len(expected)]
    clear = []
    for step in scores:
        finite = step[torch.isfinite(step)]
        first, second = finite.topk(2).values.tolist()
        clear.append(first - second >= 2 * bound(finite) * request.params.repetition_penalty)
    unclear = clear.index(False) if False in clear else len(clear)
    assert got[:unclear] == expected[:unclear]
    if got == expected:
        return
    for position in range(unclear, len(expected)):
        if clear[position]:
            forced = library.request(
                "forced", library.keys.index(request.prefix), [*request.token_ids, *expected[:position]],
                max_new_tokens=1, min_new_tokens=int(position < request.params.min_new_tokens),
                repetition_penalty=request.params.repetition_penalty,
                no_repeat_ngram_size=request.params.no_repeat_ngram_size,
            )
            done = run(make_engine(backbone, library, **engine_settings), [forced])["forced"]
            assert isinstance(done, Finished)
            assert done.outputs[0].token_ids == (expected[position],)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", range(3))
def test_every_row_of_a_random_mix_keeps_the_float32_bound(folder: Path, seed: int, name: str) -> None:
    backbone, rng, counts = tiny_backbone(folder, torch.float32), random.Random(100 + seed), Counts()
    library = Library(backbone)
    requests = random_mix(library, backbone.spec.vocab_size, 20, rng)
    settings = {"kernels": kernels(name, torch.float32)}
    engine = make_engine(
        backbone, library, blocks=40, max_rows=24, max_step_tokens=rng.choice([24, 40]), observer=counts, **settings
    )
    recorder = LogitsRecorder(engine)
    ended = run(engine, requests, rng, preempt=0.1)
    compared = 0
    for request in requests:
        done = ended[request.request_id]
        assert isinstance(done, Finished), done
        prefix = library.prefixes[request.prefix] if request.prefix else None
        for ours, theirs in logits_pairs(backbone, prefix, recorder.logits[request.request_id]):
            assert float((ours - theirs).abs().max()) <= bound(theirs), request
            compared += 1
        params, tokens = request.params, [list(output.token_ids) for output in done.outputs]
        if params.num_beams > 1:
            for output, (expected, score) in zip(done.outputs, oracle(backbone, prefix, request), strict=True):
                error = 2e-4 * params.repetition_penalty * params.max_new_tokens ** (1 - min(params.length_penalty, 0))
                assert output.score == pytest.approx(score, abs=error, rel=1e-4)
                assert len(expected) > 0
        elif not params.do_sample:
            check_greedy(backbone, library, request, tokens[0], settings)
    assert compared > 100
    assert counts.preemptions > 0
    assert counts.evictions > 0


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_unshifted_prefixes_equal_a_plain_reference_with_explicit_positions(
    folder: Path, dtype: torch.dtype, name: str
) -> None:
    """Tokens behind an unshifted prefix start at position 0; transformers is told so by ``position_ids``."""
    backbone, rng = tiny_backbone(folder, dtype), random.Random(5)
    library = Library(backbone, positions="unshifted")
    shifted = Library(backbone)
    requests = [
        library.request(f"u{i}", i % 9, [rng.randrange(304) for _ in range(rng.choice([1, 16, 40]))],
                        max_new_tokens=12, **rng.choice([{}, {"num_beams": 2}, {"do_sample": True, "seed": i}]))
        for i in range(18)
    ]
    engine = make_engine(backbone, library, blocks=60, max_rows=18, max_step_tokens=40,
                         kernels=kernels(name, dtype))
    recorder = LogitsRecorder(engine)
    ended = run(engine, requests, rng, preempt=0.1)
    for request in requests:
        done = ended[request.request_id]
        assert isinstance(done, Finished)
        prefix = library.prefixes[request.prefix] if request.prefix else None
        recorded = recorder.logits[request.request_id]
        for ours, theirs in logits_pairs(backbone, prefix, recorded):
            assert float((ours - theirs).abs().max()) <= (1e-5 if dtype is torch.float64 else bound(theirs))
        if request.prefix:  # and the two ways of counting really differ
            pairs = logits_pairs(backbone, shifted.prefixes[request.prefix], recorded)
            assert max(float((ours - theirs).abs().max()) for ours, theirs in pairs) > 0.01
        if request.params.num_beams == 1 and not request.params.do_sample and dtype is torch.float64:
            context = request.token_ids
            for token in done.outputs[0].token_ids:
                assert token == int(oracle_logits(backbone, prefix, context)[-1].argmax())
                context = (*context, token)


def test_an_unshifted_prefix_takes_nothing_from_the_window(folder: Path) -> None:
    backbone = tiny_backbone(folder, torch.float64)
    library = Library(backbone, lengths=[100], positions="unshifted")
    request = library.request("r", 0, range(300), max_new_tokens=50)
    done = run(make_engine(backbone, library), [request])["r"]
    assert isinstance(done, Finished)
    assert len(done.outputs[0].token_ids) == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_transformers(folder: Path, dtype: torch.dtype) -> None:
    """Both against float64 on the same tokens; root mean square and maximum over all rows of a mix."""
    low, rng = tiny_backbone(folder, dtype), random.Random(7)
    exact = tiny_backbone(folder, torch.float64)
    library = Library(low)
    requests = [
        library.request(f"h{i}", i % 9, [rng.randrange(304) for _ in range(rng.choice([1, 5, 16, 60]))],
                        max_new_tokens=20, **rng.choice([{}, {"do_sample": True, "seed": i}]))
        for i in range(18)
    ]
    engine = make_engine(low, library, blocks=60, max_rows=18, max_step_tokens=40)
    recorder = LogitsRecorder(engine)
    ended = run(engine, requests, rng, preempt=0.1)
    assert all(isinstance(done, Finished) for done in ended.values())
    ours, theirs = [], []
    for request in requests:
        prefix = library.prefixes[request.prefix] if request.prefix else None
        recorded = recorder.logits[request.request_id]
        reference = logits_pairs(exact, prefix, recorded)
        for (mine, truth), (_, other) in zip(reference, logits_pairs(low, prefix, recorded), strict=True):
            ours.append(mine.double() - truth)
            theirs.append(other.double() - truth)
    mine, other = torch.stack(ours), torch.stack(theirs)
    assert float(other.abs().max()) > 1e-3, "the oracle itself is exact: nothing is compared"
    assert float(mine.square().mean().sqrt()) <= 2 * float(other.square().mean().sqrt())
    assert float(mine.abs().max()) <= 2 * float(other.abs().max())
