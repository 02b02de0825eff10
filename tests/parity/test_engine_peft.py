"""Prefixes imported from PEFT folders, mixed in one engine, give the tokens of PEFT's own ``generate``, each alone."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.backbone import Backbone
from prefixes.formats.peft import import_peft
from server.engine.types import Finished, PrefixKey
from tests.support.engine import KERNELS, Counts, Library, kernels, make_engine, run, tiny_backbone
from tests.support.llama import make_norms_exact, tiny_llama

ADAPTERS: dict[str, Any] = {
    "one": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
    "sixteen": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16),
    "projected": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=17, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=1),
}
DTYPE = torch.float64


@pytest.fixture(scope="module", params=["gpt2", "llama3", "yarn", "mistral", "qwen3", "smollm3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backbone]:
    """A backbone, and beside its folder one per adapter, each with random weights, saved by PEFT."""
    root: Path = tmp_path_factory.mktemp("peft")
    if request.param == "gpt2":
        backbone = tiny_backbone(root / "backbone", DTYPE)
    else:
        backbone = tiny_llama(root / "backbone", request.param, DTYPE)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "backbone"), deepcopy(config))
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.normal_()
        model.eval().save_pretrained(root / name)
    return root, backbone


def peft_tokens(folder: Path, adapter: str, token_ids: tuple[int, ...], **settings: Any) -> list[int]:
    base = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype=DTYPE)
    make_norms_exact(base)
    model = PeftModel.from_pretrained(base, folder / adapter).eval()
    prompt = torch.tensor([token_ids])
    out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                         **settings)
    tokens: list[int] = out[0, len(token_ids) :].tolist()
    end = base.config.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.parametrize("name", KERNELS)
def test_a_mix_of_imported_prefixes_gives_pefts_tokens(loaded: tuple[Path, Backbone], name: str) -> None:
    (folder, backbone), rng, counts = loaded, random.Random(0), Counts()
    library = Library(backbone, lengths=[0])
    adapters: list[str | None] = [None]
    for adapter in ADAPTERS:
        prefix = read_prefix(write_prefix(import_peft(folder / adapter, backbone.spec)))
        key = PrefixKey("default", version_of(prefix))
        library.prefixes[key] = prefix
        library.keys.append(key)
        adapters.append(adapter)
    requests, settings = [], []
    for index in range(16):
        settings.append({"max_new_tokens": 16, "min_new_tokens": rng.choice([0, 12]), "num_beams": rng.choice([1, 3])})
        prompt = [rng.randrange(304) for _ in range(rng.choice([1, 15, 40]))]
        requests.append(library.request(f"p{index}", index % len(adapters), prompt, **settings[-1]))
    engine = make_engine(
        backbone, library, blocks=40, max_rows=16, max_step_tokens=32, observer=counts, kernels=kernels(name, DTYPE)
    )
    ended = run(engine, requests, rng, preempt=0.1)
    for index, request in enumerate(requests):
        imported, done = adapters[index % len(adapters)], ended[request.request_id]
        assert isinstance(done, Finished), done
        if imported:
            expected = peft_tokens(folder, imported, request.token_ids, **settings[index])
            assert list(done.outputs[0].token_ids) == expected
    assert max(tasks for _, tasks, _ in counts.steps) >= 4
