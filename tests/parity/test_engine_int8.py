"""int8 weights in each family: an engine with them against one in floats over the same weights, rounded beforehand."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from prefixes.backbone import Backbone
from server.engine.kernels import select_kernels
from server.engine.kernels.base import Quantization
from server.engine.types import Finished
from tests.support.bart import tiny_bart
from tests.support.bart_library import BartLibrary
from tests.support.engine import Library, LogitsRecorder, make_engine, run, tiny_backbone
from tests.support.llama import tiny_llama
from tests.support.t5 import tiny_t5

FAMILIES: dict[str, tuple[Callable[[Path], Backbone], Callable[[Backbone], Library]]] = {
    "gpt2": (tiny_backbone, Library),
    "llama": (tiny_llama, Library),
    "bart": (functools.partial(tiny_bart, window=512), BartLibrary),
    "t5": (functools.partial(tiny_t5, kind="t5 v1.1"), BartLibrary),
}
TOKEN_TABLES = ("wte", "embed_tokens", "shared")


@torch.no_grad()
def with_rounded_weights(backbone: Backbone) -> Backbone:
    """A copy whose linear layers and tables of tokens have each output's weights rounded to 255 steps."""
    model = copy.deepcopy(backbone.model)
    weights = {}
    for name, module in model.named_modules():
        named = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear | Conv1D) or named in TOKEN_TABLES:
            weights[module.weight.data_ptr()] = (module.weight, isinstance(module, Conv1D))
    for weight, inputs_first in weights.values():
        by_output = weight.t() if inputs_first else weight
        steps = by_output.abs().amax(dim=1, keepdim=True).clamp_min(1e-300) / 127  # a padding token is zeros
        rounded = (by_output / steps).round() * steps
        weight.copy_(rounded.t() if inputs_first else rounded)
    return replace(backbone, model=model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_with_int8_weights_is_one_with_rounded_ones(family: str, tmp_path: Path) -> None:
    """Rows of a mix, prefixes and beams among them: what else is lost, in rows of 15 bits, is a thousandth at most."""
    make_backbone, make_library = FAMILIES[family]
    backbone, rng = make_backbone(tmp_path), random.Random(family)
    library = make_library(backbone)
    requests = [
        library.request(
            f"r{index}", index % len(library.keys), [rng.randrange(290) for _ in range(rng.choice([1, 16, 40]))],
            max_new_tokens=6, min_new_tokens=6, num_beams=rng.choice([1, 1, 3]),
        )
        for index in range(12)
    ]  # fmt: skip
    found = []
    cases: list[tuple[Backbone, Quantization]] = [
        (backbone, "int8"), (with_rounded_weights(backbone), "none"), (backbone, "none"),
    ]  # fmt: skip
    for model, quantize in cases:
        kernels = select_kernels("cpu", torch.float64, threads=2, quantize=quantize)
        engine = make_engine(copy.deepcopy(model), library, max_rows=40, kernels=kernels)
        recorder = LogitsRecorder(engine)
        ended = run(engine, requests)
        for done in ended.values():
            assert isinstance(done, Finished), done
        engine.close()
        kernels.close()  # type: ignore[attr-defined]
        found.append(recorder.logits)
    ours, rounded, floats = found
    compared, apart, lost = 0, 0.0, 0.0
    for request in requests:
        name = request.request_id
        for tokens in ours[name].keys() & rounded[name].keys():
            scale = rounded[name][tokens].abs().max()
            assert (ours[name][tokens] - rounded[name][tokens]).abs().max() < 1e-3 * scale, (name, len(tokens))
            apart = max(apart, float((ours[name][tokens] - rounded[name][tokens]).abs().max() / scale))
            if tokens in floats[name]:
                lost = max(lost, float((ours[name][tokens] - floats[name][tokens]).abs().max() / scale))
            compared += 1
    assert compared > 50
    assert lost > 5 * apart, "the weights were rounded"
