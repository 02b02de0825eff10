"""The numeric contract on a GPU: the same engine, the same bounds, for each dtype that it serves there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from prefixes.backbone import load_backbone
from server.engine.kernels import select_kernels
from server.engine.types import Finished
from tests.support.engine import Library, LogitsRecorder, make_engine, oracle_logits, run, tiny_backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mix_on_the_gpu_errs_at_most_twice_as_much_as_transformers_there(tmp_path: Path, dtype: torch.dtype) -> None:
    exact, rng = tiny_backbone(tmp_path, torch.float64), random.Random(3)
    backbone = load_backbone(str(tmp_path), dtype=dtype, device="cuda")
    library = Library(backbone)
    requests = [
        library.request(f"g{i}", i % 9, [rng.randrange(304) for _ in range(rng.choice([1, 5, 16, 60]))],
                        max_new_tokens=20, **rng.choice([{}, {"do_sample": True, "seed": i}]))
        for i in range(18)
    ]
    kernels = select_kernels(torch.device("cuda"), dtype)
    engine = make_engine(backbone, library, blocks=60, max_rows=18, max_step_tokens=40, kernels=kernels)
    recorder = LogitsRecorder(engine)
    ended = run(engine, requests, rng, preempt=0.1)
    ours, theirs = [], []
    for request in requests:
        assert isinstance(ended[request.request_id], Finished)
        prefix = library.prefixes[request.prefix] if request.prefix else None
        for context, logits in recorder.logits[request.request_id].items():
            truth = oracle_logits(exact, prefix, context)[-1]
            ours.append(logits.cpu().double() - truth)
            theirs.append(oracle_logits(backbone, prefix, context)[-1].cpu().double() - truth)
    mine, other = torch.stack(ours), torch.stack(theirs)
    assert float(mine.square().mean().sqrt()) <= 2 * max(float(other.square().mean().sqrt()), 1e-6)
    assert float(mine.abs().max()) <= 2 * max(float(other.abs().max()), 1e-5)
