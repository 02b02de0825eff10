"""A server whose weights are int8: what it says of them, and answers that are the same in a mix as alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import prefixd
from tests.support.server import ServerProcess, TinyWorld, upload

TASKS = 5


@pytest.fixture(scope="module")
def quantized(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    arguments = (
        *("--backbone", str(world.folder), "--registry", str(tmp_path_factory.mktemp("registry"))),
        *("--quantize", "int8", "--deterministic", "--threads", "2", "--kv-cache-bytes", "64MiB", "--max-rows", "8"),
    )
    with ServerProcess(tmp_path_factory.mktemp("server"), *arguments) as process:
        process.wait_ready()
        with process.client() as client:
            for task in range(TASKS):
                upload(client, f"task{task}", world.prefix(length=3 + task, seed=task)).raise_for_status()
        yield process


def test_answers_of_a_mix_are_those_of_each_request_alone(quantized: ServerProcess) -> None:
    bodies: list[dict[str, Any]] = [
        {"task": f"task{index % TASKS}", "input": "Blue Spice " * (1 + index % 3),
         "parameters": {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 1 + index % 2}}
        for index in range(20)
    ]  # fmt: skip
    with quantized.client() as client:
        def ask(body: dict[str, Any]) -> Any:
            return client.post("/generate", json=body).raise_for_status().json()["outputs"]

        alone = [ask(body) for body in bodies]
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(ask, bodies))
    assert together == alone
    assert len({json.dumps(outputs) for outputs in alone}) > 2


def test_the_log_says_what_is_kept_of_the_weights(quantized: ServerProcess) -> None:
    assert [line["quantize"] for line in quantized.log_lines() if "quantize" in line] == ["int8"]


def test_evaluate_scores_as_such_a_server_answers(
    world: TinyWorld, quantized: ServerProcess, tmp_path: Path
) -> None:
    artifact, data, output = tmp_path / "prefix.safetensors", tmp_path / "data.jsonl", tmp_path / "scores"
    artifact.write_bytes(world.prefix(length=7, seed=4))
    inputs = [f"Blue Spice {number}" for number in range(12)]
    data.write_text("".join(json.dumps({"input": text, "target": "x"}) + "\n" for text in inputs))
    options = ["--artifact", str(artifact), "--backbone", str(world.folder), "--data", str(data), "--metric", "bleu"]
    options += ["--parameter", "max_new_tokens=12", "--parameter", "min_new_tokens=12", "--quantize", "int8"]
    made = CliRunner().invoke(prefixd.app, ["evaluate", *options, "--output", str(output)])
    assert made.exit_code == 0, made.output
    assert json.loads((output / "evaluation.json").read_text())["decoding"]["quantize"] == "int8"
    parameters = {"max_new_tokens": 12, "min_new_tokens": 12}
    with quantized.client() as client:
        for line in (output / "outputs.jsonl").read_text().splitlines():
            scored = json.loads(line)
            body = {"task": "task4", "input": scored["input"], "parameters": parameters}
            answer = client.post("/generate", json=body).raise_for_status().json()
            assert answer["outputs"][0]["text"] == scored["output"]
