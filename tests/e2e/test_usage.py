"""A real server records what it answered: all of it when it is drained, and when it is killed all but the last."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from prefixes.registry import open_registry
from prefixes.usage.model import Counts
from tests.support.server import ServerProcess, make_world
from tests.support.traffic import generate

FLUSH_S = 0.5


def total(url: str) -> Counts:
    """All that the registry has recorded."""
    with closing(open_registry(url, create=False)) as registry:
        rows = list(registry.usage.read("0001-01-01", "9999-12-31"))
    return sum((row.counts for row in rows), Counts())


def counted(server: ServerProcess, requests: int) -> list[Counts]:
    """What the client counts, request by request."""
    found = []
    for number in range(requests):
        usage: Any = generate(server, None, {"max_new_tokens": 1 + number % 3}, "x" * (1 + number)).body["usage"]
        found.append(Counts(1, usage["input_tokens"], usage["prefix_tokens"], usage["output_tokens"]))
    return found


def wait_for(wanted: Callable[[], bool]) -> None:
    """Return once it is so."""
    deadline = time.monotonic() + 60
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_recorded_is_what_was_answered(tmp_path: Path, end: signal.Signals) -> None:
    world, url = make_world(tmp_path / "backbone"), str(tmp_path / "registry")
    arguments = ("--backbone", str(world.folder), "--registry", url, "--threads", "1", "--kernels", "torch")
    flush_s = str(FLUSH_S if end is signal.SIGKILL else 3600)  # of a drain nothing depends on it
    with ServerProcess(tmp_path, *arguments, "--usage-flush-s", flush_s) as server:
        server.wait_ready()
        old = counted(server, 4)
        if end is signal.SIGKILL:
            wait_for(lambda: total(url) == sum(old, Counts()))  # after the interval all is there
        new = counted(server, 4)
        server.signal(end)
        server.wait()
    recorded = total(url)
    if end is signal.SIGTERM:
        assert recorded == sum(old + new, Counts())
    else:  # a kill loses the last ones alone, and adds none
        assert recorded in [sum(old + new[:some], Counts()) for some in range(len(new) + 1)]
