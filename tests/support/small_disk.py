"""Runs a test's module on a disk of its own that is small enough to fill. Knows no test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

_NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-ec")
_MOUNT = 'mount -t tmpfs -o size="$1" none "$2"; shift 2; exec "$@"'


def on_a_small_disk(module: str, disk: Path, *arguments: str | Path, size: str, timeout_s: float = 300) -> str:
    """What ``python -m module disk arguments`` prints where ``disk`` has ``size``; the test is skipped if none can be.

    Only that process and its children see the disk, and it goes with the last of them.
    """
    disk.mkdir()
    mount = (*_NAMESPACE, _MOUNT, "sh", size, str(disk))
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace of its own")
    done = subprocess.run(
        [*mount, sys.executable, "-m", module, str(disk), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fill(disk: Path) -> Path:
    """A file that takes all of the disk that was free."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast
