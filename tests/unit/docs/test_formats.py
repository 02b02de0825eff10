"""The programs in docs/formats.md run, and make what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from prefixes.artifact import Prefix, read_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.formats.cartridge import import_cartridge
from server.engine.kernels.torch_reference import TorchKernels
from server.engine.types import Finished, PrefixKey
from tests.support.engine import Library, make_engine, run
from tests.support.llama import save_tiny_llama
from tests.support.paths import ROOT

BY_HAND, CONVERSION = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "formats.md").read_text(), re.S)


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    save_tiny_llama(tmp_path / "backbone", "qwen3", begins=True)
    return load_backbone(str(tmp_path / "backbone"))


def made_by_hand(backbone: Backbone) -> Prefix:
    exec(BY_HAND.replace("Qwen/Qwen3-0.6B", backbone.name), {})
    return read_prefix(Path("mine.safetensors").read_bytes())


def test_the_artifact_made_by_hand_stands_before_the_input(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prefix = made_by_hand(backbone)
    prompt = backbone.prompt_encoder.encode(prefix.spec.template, "name : Blue Spice")
    library, key = Library(backbone, lengths=[0]), PrefixKey("default", "sha256:" + "0" * 64)
    library.prefixes[key] = prefix
    library.keys.append(key)
    request = library.request("r", 1, prompt, max_new_tokens=8, min_new_tokens=8)
    done = run(make_engine(backbone, library, kernels=TorchKernels()), [request])["r"]
    assert isinstance(done, Finished)
    text = backbone.tokenizer("You write about restaurants. ").input_ids
    whole = torch.tensor([text + prompt])
    expected = backbone.model.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=8, min_new_tokens=8, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert list(done.outputs[0].token_ids) == expected[0, whole.shape[1] :].tolist()


def test_a_pickled_cartridge_is_converted(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prefix = made_by_hand(backbone)
    named = {
        f"layers.{layer}.attention.prefix.{part}s": prefix.tensors[f"decoder.{part}"][layer][None]
        for layer in range(backbone.spec.sites["decoder"].layers)
        for part in ("key", "value")
    }
    torch.save({**named, "step": torch.tensor(7)}, "cartridge.pt")
    exec(CONVERSION, {})
    converted = import_cartridge("cartridge.safetensors", backbone.spec)
    assert all(torch.equal(converted.tensors[name], tensor) for name, tensor in prefix.tensors.items())
