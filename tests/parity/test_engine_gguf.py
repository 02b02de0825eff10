"""The engine over a quantised GGUF file: from a text, token for token what transformers generates from the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from server.engine.types import Finished, GenerationRequest, SamplingParams
from tests.support.engine import KERNELS, Library, kernels, make_engine, run
from tests.support.gguf import tiny_gguf


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("begins", [False, True], ids=["bare", "with a first token"])
def test_texts_of_a_quantised_file_are_transformers_own(tmp_path: Path, name: str, begins: bool) -> None:
    backbone = tiny_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.Q4_1, begins=begins)
    file = {"gguf_file": "tiny.gguf"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **file
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **file)
    texts = ["name : Blue Spice | Type : coffee shop", "café ☕", "a"]
    library, params = Library(backbone), SamplingParams(max_new_tokens=20)
    requests = [
        GenerationRequest(text, "default", tuple(backbone.prompt_encoder.encode("{input}", text)), params)
        for text in texts
    ]
    ended = run(
        make_engine(backbone, library, max_rows=4, kernels=kernels(name, torch.float32)), requests, random.Random(0)
    )
    for request, text in zip(requests, texts, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=0, pad_token_id=0)[0]
        done = ended[request.request_id]
        assert isinstance(done, Finished), done
        assert [*request.token_ids, *done.outputs[0].token_ids] == expected.tolist()
