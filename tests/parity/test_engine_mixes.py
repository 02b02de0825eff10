"""The numeric contract: every row of a random mix equals that row alone, in transformers and in this engine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from prefixes.backbone import Backbone
from server.engine.types import Finished
from tests.support.engine import Counts, Library, make_engine, oracle, random_mix, run, tiny_backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_every_row_of_a_random_mix_equals_the_row_alone_in_float64(backbone: Backbone, seed: int) -> None:
    rng = random.Random(seed)
    library, counts = Library(backbone), Counts()
    requests = random_mix(library, backbone.spec.vocab_size, 24, rng)
    size = rng.choice([8, 16])
    engine = make_engine(
        backbone,
        library,
        blocks=720 // size,  # a fraction of what the mix would like: preemption and eviction on the way
        block_size=size,
        max_step_tokens=rng.choice([24, 40, 128]),
        max_rows=24,
        observer=counts,
    )
    ended = run(engine, requests, rng, preempt=0.1)
    for request in requests:
        done = ended[request.request_id]
        assert isinstance(done, Finished), done
        if request.params.do_sample:
            alone = run(make_engine(backbone, library), [request])[request.request_id]
            assert isinstance(alone, Finished)
            assert done.outputs == alone.outputs
        else:
            prefix = library.prefixes[request.prefix] if request.prefix else None
            expected = oracle(backbone, prefix, request)
            assert [list(output.token_ids) for output in done.outputs] == [tokens for tokens, _ in expected], request
            for output, (_, score) in zip(done.outputs, expected, strict=True):
                assert score is None or output.score == pytest.approx(score, rel=1e-5)
    assert counts.preemptions > 0
    assert counts.evictions > 0
