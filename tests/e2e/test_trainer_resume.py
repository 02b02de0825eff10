"""A real training process, killed without warning, resumed to the very same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.trainer import BART_TEMPLATE, FAMILIES, TEMPLATE, toy_pairs, write_jsonl

RUN = "import typer; from trainer.cli.train import train; typer.run(train)"


def command(folder: Path, family: str, output: str, *more: str) -> list[str]:
    template = {"gpt2": TEMPLATE, "bart": BART_TEMPLATE}[family]
    options = [
        "--task", "toy", "--data", str(folder / "data.jsonl"), "--backbone", str(folder / "backbone"),
        "--template", template, "--output", str(folder / output), "--hold-out", "20", "--epochs", "100",
        "--batch-size", "8", "--lr", "0.003", "--middle", "16", "--checkpoint-every", "25",
        "--validate-every", "90", "--threads", "1",
    ]  # fmt: skip
    return [sys.executable, "-c", RUN, *options, *more]


def finish(arguments: list[str]) -> str:
    """Run to the end; the version it prints."""
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_killed_by_sigkill_resumes_to_the_same_version(tmp_path: Path, family: str) -> None:
    FAMILIES[family](tmp_path / "backbone")
    write_jsonl(tmp_path / "data.jsonl", toy_pairs(40))
    expected = finish(command(tmp_path, family, "whole"))

    started = command(tmp_path, family, "cut")
    killed = subprocess.Popen(started, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "cut" / "checkpoint.safetensors").exists():
            assert killed.poll() is None and time.monotonic() < deadline, "ended before its first checkpoint"
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
    finally:
        killed.kill()
        killed.wait()
    assert not (tmp_path / "cut" / "report.json").exists(), "killed in the middle, not after the end"
    assert finish(command(tmp_path, family, "cut", "--resume")) == expected
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
