"""BART large, with random weights: a real server loads it, serves mixed rows, and stays within its memory bound."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from prefixes.artifact import write_prefix
from prefixes.backbone import load_backbone
from prefixes.spec import BackboneSpec, Site
from tests.support.bart import random_bart_prefix, save_tiny_bart_tokenizer
from tests.support.server import ServerProcess, upload

pytestmark = pytest.mark.slow

MIB = 1 << 20
POOL = 768 * MIB
BESIDE = 1280 * MIB
"""What a server may take beside weights and pool: Python, torch, transformers, the compiled kernels, activations, the
checkpoint's file while it loads, artifacts in host memory, prefixes on their way into the pool (three at once here).
docs/architecture.md states this bound."""

SUBSETS: tuple[tuple[Site, ...], ...] = (("decoder", "encoder", "cross"), ("encoder", "cross"), ("decoder",))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The geometry of facebook/bart-large; weights in half precision, as large checkpoints are often stored."""
    folder = tmp_path_factory.mktemp("bart-large")
    torch.manual_seed(0)
    config = BartConfig(forced_bos_token_id=0)  # the defaults are bart-large's: 12 + 12 layers, 1,024 wide, 16 heads
    with torch.device("meta"):
        model = BartForConditionalGeneration(config)
    model = model.to_empty(device="cpu").half()
    for name, parameter in model.named_parameters():
        values = torch.ones_like(parameter) if "norm" in name and "weight" in name else None
        parameter.data = torch.randn(parameter.shape, dtype=torch.float16) * 0.02 if values is None else values
    model.final_logits_bias.zero_()
    model.tie_weights()
    model.save_pretrained(folder)
    save_tiny_bart_tokenizer(folder)
    return folder


def test_bart_large_serves_mixed_articles_within_its_memory_bound(large: Path, tmp_path: Path) -> None:
    arguments = ("--backbone", str(large), "--registry", str(tmp_path / "registry"), "--threads", "2")
    with ServerProcess(tmp_path, *arguments, "--kv-cache-bytes", f"{POOL}") as server:
        server.wait_ready(300)
        spec, weights = spec_of(large)
        with server.client() as client:
            client.timeout = 300
            for seed, sites in enumerate(SUBSETS):
                prefix = random_bart_prefix(spec, sites, 200, seed=seed, scale=0.1, template="<s>{input}</s>")
                assert upload(client, f"task{seed}", write_prefix(prefix)).status_code == 201

            def ask(index: int) -> dict[str, Any]:
                parameters = {"max_new_tokens": 8, "num_beams": [1, 4][index % 2], "truncate": True}
                body = {"task": f"task{index % 3}", "input": "a long article " * 400, "parameters": parameters}
                return client.post("/generate", json=body, timeout=300).json()  # type: ignore[no-any-return]

            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(ask, range(6)))
        assert all(answer["usage"]["input_tokens"] == 1024 and answer["truncated"] for answer in answers), answers
        assert [answer["usage"]["prefix_tokens"] for answer in answers] == [600, 400, 200] * 2
        peak = peak_memory(server.process.pid)
        assert peak < weights + POOL + BESIDE, f"{peak / MIB:.0f} MiB, of which weights {weights / MIB:.0f}"


def spec_of(folder: Path) -> tuple[BackboneSpec, int]:
    """The backbone's spec, and its weights' bytes in float32."""
    backbone = load_backbone(str(folder), dtype=torch.bfloat16)
    return backbone.spec, sum(parameter.numel() * 4 for parameter in backbone.model.parameters())


def peak_memory(pid: int) -> int:
    """The most that a process has held in memory, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM on this system")
