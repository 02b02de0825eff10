"""The numeric contract for the Llama family: each kind of it against transformers, token for token in float64."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from server.engine.types import Finished, FinishReason
from tests.support.engine import (
    KERNELS,
    Counts,
    Library,
    LogitsRecorder,
    kernels,
    make_engine,
    oracle,
    oracle_logits,
    random_mix,
    run,
)
from tests.support.llama import KINDS, tiny_llama


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_random_mix_equals_transformers(tmp_path: Path, kind: str, name: str) -> None:
    backbone = tiny_llama(tmp_path, kind)
    rng, library, counts = random.Random(len(kind)), Library(backbone), Counts()
    requests = [one for one in random_mix(library, 304, 24, rng) if not one.params.do_sample]
    engine = make_engine(
        backbone, library, blocks=90, block_size=8, max_step_tokens=rng.choice([24, 40, 128]), max_rows=24,
        observer=counts, kernels=kernels(name, torch.float64),
    )  # fmt: skip
    ended = run(engine, requests, rng, preempt=0.1)
    for request in requests:
        done = ended[request.request_id]
        assert isinstance(done, Finished), done
        expected = oracle(backbone, library.prefixes[request.prefix] if request.prefix else None, request)
        assert [list(output.token_ids) for output in done.outputs] == [tokens for tokens, _ in expected], request
        for output, (tokens, score) in zip(done.outputs, expected, strict=True):
            assert output.finish_reason is (FinishReason.STOP if tokens[-1] == 0 else FinishReason.LENGTH)
            assert score is None or output.score == pytest.approx(score, rel=1e-5)
    assert counts.preemptions > 0


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
# An engine gives logits in float32, whatever the model computes in.
def test_logits_are_within_the_contracts_bound(
    tmp_path: Path, kind: str, dtype: torch.dtype, name: str
) -> None:
    backbone = tiny_llama(tmp_path, kind, dtype)
    rng, library = random.Random(7), Library(backbone, positions=random.Random(kind).choice(["shifted", "unshifted"]))
    requests = [
        library.request(f"r{task}", task, [rng.randrange(304) for _ in range(rng.choice([1, 17, 60]))],
                        max_new_tokens=6, min_new_tokens=6)
        for task in range(9)
    ]  # fmt: skip
    engine = make_engine(backbone, library, max_step_tokens=40, max_rows=9, kernels=kernels(name, dtype))
    recorder = LogitsRecorder(engine)
    run(engine, requests, rng)
    for request in requests:
        prefix = library.prefixes[request.prefix] if request.prefix else None
        for tokens, got in recorder.logits[request.request_id].items():
            expected = oracle_logits(backbone, prefix, tokens)[-1]
            greatest = float(expected.abs().max())
            bound = 1e-7 * greatest if dtype == torch.float64 else max(1e-4, 1e-5 * greatest)
            assert float((got - expected).abs().max()) <= bound


def turned_back(backbone: Backbone, prefix: Prefix) -> Prefix:
    """``prefix`` as an unshifted one, its keys rotated by as many positions as it is long, backwards."""
    key, sited = prefix.tensors["decoder.key"], prefix.spec.sites["decoder"]
    angles = -sited.length * backbone.model.model.rotary_emb.inv_freq.double()
    (left, right), cos, sin = key.chunk(2, dim=-1), angles.cos(), angles.sin()
    rotated = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    turns = getattr(backbone.model.config, "no_rope_layers", None) or [1] * sited.geometry.layers
    keys = torch.where(torch.tensor(turns).bool()[:, None, None, None], rotated, key)
    spec = replace(prefix.spec, sites={"decoder": replace(sited, positions="unshifted")})
    return Prefix(spec, {**prefix.tensors, "decoder.key": keys})


@pytest.mark.parametrize("kind", ["llama", "llama3", "yarn", "qwen3", "smollm3"])
def test_an_unshifted_prefix_is_a_shifted_one_whose_keys_are_turned_back(tmp_path: Path, kind: str) -> None:
    """Only the difference of two positions counts: what one kind of prefix computes, the other can too."""
    backbone = tiny_llama(tmp_path, kind)
    shifted = Library(backbone, lengths=[17], scale=3.0).prefixes
    prefixes = [*shifted.values(), *(turned_back(backbone, prefix) for prefix in shifted.values())]
    library = Library(backbone, lengths=[17, 17], make=lambda index, _: prefixes[index])
    engine = make_engine(backbone, library, kernels=kernels("numba", torch.float64))
    recorder = LogitsRecorder(engine)
    requests = [library.request(f"r{task}", task, [5, 60, 7, 9], max_new_tokens=1) for task in (0, 1)]
    run(engine, requests)
    (one,), (other,) = (recorder.logits[request.request_id].values() for request in requests)
    torch.testing.assert_close(one, other, atol=1e-4 * float(one.abs().max()), rtol=0)
    same_keys = oracle_logits(backbone, replace(prefixes[0], spec=prefixes[1].spec), [5, 60, 7, 9])[-1]
    assert float((one - same_keys).abs().max()) > 0.01 * float(one.abs().max()), "or the turn did nothing"
