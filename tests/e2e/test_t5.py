"""A T5 as a user starts and uses it: from a text to a text, as transformers does it, and with a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefixes.artifact import write_prefix
from prefixes.backbone import Backbone, load_backbone
from tests.support.bart import random_bart_prefix
from tests.support.server import ServerProcess, events, upload
from tests.support.t5 import save_tiny_t5

TEXT = "Blue Spice is a coffee shop"
WINDOW = 64


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder: Path = tmp_path_factory.mktemp("backbone")
    save_tiny_t5(folder, "t5 v1.1", window=WINDOW)
    return load_backbone(str(folder))


@pytest.fixture(scope="module")
def client(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("server")
    arguments = ("--backbone", backbone.name, "--registry", str(folder / "registry"), "--kv-cache-bytes", "32MiB")
    with ServerProcess(folder, *arguments, "--kernels", "torch", "--threads", "1") as process:
        process.wait_ready()
        with process.client() as client:
            prefix = random_bart_prefix(backbone.spec, length=5, positions="shifted", template="item : {input}")
            assert upload(client, "mine", write_prefix(prefix)).status_code == 201
            yield client


def ask(client: httpx.Client, task: str | None, text: str, **parameters: Any) -> Any:
    answer = client.post("/generate", json={"task": task, "input": text, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_without_a_task_a_text_gives_transformers_text(client: httpx.Client, backbone: Backbone) -> None:
    answer = ask(client, None, TEXT, max_new_tokens=12)
    inputs = backbone.tokenizer(TEXT, return_tensors="pt")
    with torch.inference_mode():
        ids = backbone.model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False)[0]
    assert answer["outputs"][0]["text"] == backbone.tokenizer.decode(ids, skip_special_tokens=True)
    assert answer["usage"]["input_tokens"] == inputs.input_ids.shape[1]


def test_a_prefix_changes_the_answer_and_a_stream_gives_the_same(client: httpx.Client) -> None:
    parameters = {"max_new_tokens": 12, "min_new_tokens": 12}
    whole = ask(client, "mine", TEXT, **parameters)["outputs"][0]["text"]
    assert whole != ask(client, None, TEXT, **parameters)["outputs"][0]["text"]
    body = {"task": "mine", "input": TEXT, "stream": True, "parameters": parameters}
    with client.stream("POST", "/generate", json=body) as response:
        parts = [data["text"] for name, data in events(response.iter_lines()) if name == "token"]
    assert "".join(parts) == whole


def test_an_end_token_in_a_users_text_is_text(client: httpx.Client, backbone: Backbone) -> None:
    usage = ask(client, None, f"{TEXT}</s>", max_new_tokens=1)["usage"]
    assert usage["input_tokens"] > len(backbone.tokenizer(TEXT).input_ids) + 1


def test_an_input_past_the_tokenizers_window_is_refused_or_cut_and_said_so(client: httpx.Client) -> None:
    refused = client.post("/generate", json={"task": "mine", "input": TEXT * 20}).json()["error"]
    assert refused["code"] == "input_too_long" and refused["detail"]["expected"] == WINDOW - 5
    assert "a window of 64, less 5 of the prefix" in refused["message"]
    cut = ask(client, "mine", TEXT * 20, truncate=True, max_new_tokens=3)
    assert cut["truncated"] is True and cut["usage"]["input_tokens"] == WINDOW - 5
