"""What was freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import threading
from server.engine.memory.heap import trim_heap

MIB = 1 << 20

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def take():
    taken = [bytearray(b"x" * MIB) for _ in range(40)]
    kept.append(taken[-1])  # at the end of what the thread has, so that its arena cannot shrink by itself

bytearray(31 * MIB)  # freed, it makes glibc keep pieces of up to that size
kept = []
threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
before = resident()
trim_heap()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_what_threads_have_freed_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 64 << 20


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.engine.memory import heap

    monkeypatch.setattr(heap, "_trim", None)
    heap.trim_heap()
