"""How many threads compute, and that torch's are told to wait asleep before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine.kernels.threads import available_cores, configure_threads

SHOW = """
import os, sys
from server.engine.kernels.threads import configure_threads
assert "torch" not in sys.modules, "the module that sets torch's wait policy has loaded torch"
count = configure_threads(1)
import torch
print(count, torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"])
"""


def show(**environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP", "MKL"))}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, env={**inherited, **environment}
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("limit", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("nonsense", None)]
)
def test_cores_are_bounded_by_the_containers_share(tmp_path: Path, limit: str, expected: int | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(limit)
    unlimited = available_cores(tmp_path / "none")
    assert available_cores(file) == min(unlimited, expected or unlimited) >= 1


def test_torch_is_bounded_and_waits_asleep() -> None:
    assert show() == ["1", "1", "passive", "1"]


def test_what_the_user_has_set_stays() -> None:
    assert show(OMP_WAIT_POLICY="active")[2] == "active"


def test_more_threads_than_cores_are_refused() -> None:
    for threads in (0, available_cores() + 1):
        with pytest.raises(ValueError, match=rf"expected 1 to {available_cores()} .*, got {threads}"):
            configure_threads(threads)
