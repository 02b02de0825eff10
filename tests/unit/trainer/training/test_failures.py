"""How a run ends where memory, disk or its folder fail: a named error, nothing half-written, the checkpoint kept."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.backbone import load_backbone
from prefixes.errors import DiskFull, PrefixdError
from prefixes.files import write_bytes
from prefixes.files.folder import TEMPORARY, Folder
from tests.support.paths import ROOT
from tests.support.trainer import FAMILIES, TEMPLATE, toy_pairs, write_jsonl
from trainer.data.errors import OutOfMemory, TrainingStopped
from trainer.training.config import TrainConfig
from trainer.training.failures import named_failures
from trainer.training.loop import Progress
from trainer.training.request import RunRequest
from trainer.training.run import run_training

CONFIG = TrainConfig(
    prefix_length=4, method="direct", epochs=3, batch_size=6, learning_rate=0.01, checkpoint_every=2, accumulate=2
)


@pytest.fixture
def request_(tmp_path: Path) -> RunRequest:
    FAMILIES["gpt2"](tmp_path / "backbone")
    data = write_jsonl(tmp_path / "data.jsonl", toy_pairs(30))
    return RunRequest(data, str(tmp_path / "backbone"), TEMPLATE, tmp_path / "out", CONFIG, hold_out=20)


def test_a_folder_that_is_moved_away_is_not_made_again(request_: RunRequest) -> None:
    """A worker that lost its job meanwhile must find nothing to write to."""
    moved = request_.output.with_name("moved")

    def move(progress: Progress) -> None:
        if progress.step == 3:
            request_.output.rename(moved)

    with pytest.raises(FileNotFoundError):
        run_training(request_, report=move)
    assert not request_.output.exists()
    assert (moved / "checkpoint.safetensors").exists() and not (moved / "report.json").exists()
    with pytest.raises(FileNotFoundError):
        write_bytes(request_.output / "late", b"")


def test_a_folder_made_beforehand_and_taken_away_before_the_first_write_is_not_made_either(
    request_: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_.output.mkdir()
    inner = load_backbone

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        request_.output.rmdir()
        return inner(*arguments, **options)

    monkeypatch.setattr("trainer.training.material.load_backbone", meanwhile)
    with pytest.raises(FileNotFoundError):
        run_training(request_, resume=True)
    assert not request_.output.exists()


def test_a_stopped_run_keeps_its_checkpoint_and_resumes_to_the_same_version(request_: RunRequest) -> None:
    asked: list[int] = []
    with pytest.raises(TrainingStopped) as stopped:
        run_training(request_, should_stop=lambda: len(asked) == 5, report=lambda seen: asked.append(seen.step))
    assert (stopped.value.code, asked) == ("cancelled", [1, 2, 3, 4, 5])
    assert sorted(entry.name for entry in request_.output.iterdir()) == ["checkpoint.safetensors", "config.json"]
    resumed = run_training(request_, resume=True).version
    request_.output.rename(request_.output.with_name("first"))
    assert run_training(request_).version == resumed


SQUEEZED = """
import resource, sys
from pathlib import Path
import torch
from prefixes.errors import DiskFull, PrefixdError
from tests.support.trainer import TEMPLATE
from trainer.training.config import TrainConfig
from trainer.training.request import RunRequest
from trainer.training.run import run_training

torch.set_num_threads(1)
folder = Path(sys.argv[1])
# Gradient and optimiser state of this MLP take 0.4 GB, which are asked for in the first step.
config = TrainConfig(prefix_length=4, middle=200_000, batch_size=6)
request = RunRequest(folder / "data.jsonl", str(folder / "backbone"), TEMPLATE, folder / "out", config, hold_out=20)

def squeeze():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return False

try:
    run_training(request, should_stop=squeeze)
except PrefixdError as error:
    print(error.code, "|", error.message)
"""


def test_a_run_without_memory_ends_with_advice(request_: RunRequest, tmp_path: Path) -> None:
    """A real process that may not have more address space once its training begins."""
    done = subprocess.run(
        [sys.executable, "-c", SQUEEZED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("out_of_memory | expected enough memory for the run, got: "), done.stderr[-2000:]
    assert "takes 6 sequences at a time: a larger accumulate, a smaller batch_size" in done.stdout
    assert not (tmp_path / "out" / "report.json").exists()
    assert not [entry for entry in (tmp_path / "out").iterdir() if entry.name.startswith(TEMPORARY)]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    ],
)
def test_every_way_of_saying_out_of_memory_is_one_error(error: Exception) -> None:
    expected = r"expected enough memory for the run, got: .*; take less"
    with pytest.raises(OutOfMemory, match=expected) as caught, named_failures("take less"):
        raise error
    assert "\n" not in caught.value.message and caught.value.code == "out_of_memory"


def test_torchs_own_refusal_of_an_allocation_is_recognised() -> None:
    with pytest.raises(OutOfMemory), named_failures("take less"):
        torch.empty(1 << 62, dtype=torch.uint8)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_error_without_the_path(number: int) -> None:
    with pytest.raises(DiskFull, match="expected room on the disk") as caught, named_failures(""):
        raise OSError(number, os.strerror(number), "/secret/place")
    assert "/secret" not in caught.value.message and caught.value.code == "disk_full"


def test_a_write_to_a_full_device_leaves_the_last_checkpoint(
    request_: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own ENOSPC, from /dev/full in place of the third checkpoint's temporary file."""
    written = 0
    inner = Folder.create

    def fill(folder: Folder, name: str, *, mode: int | None = None) -> int:
        nonlocal written
        written += 1
        descriptor = inner(folder, name, mode=mode)
        if written == 4:  # behind the configuration and two checkpoints
            os.close(descriptor)
            descriptor = os.open("/dev/full", os.O_WRONLY)
        return descriptor

    monkeypatch.setattr(Folder, "create", fill)
    with pytest.raises(DiskFull):
        run_training(request_)
    monkeypatch.undo()
    assert sorted(entry.name for entry in request_.output.iterdir()) == ["checkpoint.safetensors", "config.json"]
    steps: list[int] = []
    run_training(request_, resume=True, report=lambda progress: steps.append(progress.step))
    assert steps[0] == 5, "the second checkpoint was whole"


def test_other_errors_pass_as_they_are() -> None:
    for error in (RuntimeError("shapes"), PermissionError(errno.EACCES, "no"), PrefixdError("named")):
        with pytest.raises(type(error)) as caught, named_failures(""):
            raise error
        assert caught.value is error


def test_a_request_is_json_and_names_no_content(request_: RunRequest) -> None:
    assert json.loads(json.dumps(request_.as_dict()))["autocast"] is False
