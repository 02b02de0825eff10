"""Writers killed at any moment: what they promised is there, what is there is whole, and the next one works."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

import pytest

import prefixd
from prefixes.artifact import read_prefix, version_of
from prefixes.registry import open_registry
from tests.support.checkup import SERVER, Checkup
from tests.support.figures import Figures
from tests.support.processes import FORK
from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess, TinyWorld, upload
from tests.support.traffic import Write, Writer, check_writes, generate

SERVERS_KILLED: Final = 4
WRITERS: Final = 4
PUBLISHERS_KILLED: Final = 60
LATE_S: Final = 30.0

Url = str


@pytest.fixture(params=["disk", "redis"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Url]:
    """As it is deployed: each write is on disk before it is answered."""
    if request.param == "disk":
        yield str(tmp_path / "registry")
        return
    with RedisServer(append_only=True, config={"appendfsync": "always"}) as redis:
        yield redis.url


def test_a_server_killed_under_writes_keeps_what_it_promised(
    figures: Figures, world: TinyWorld, tmp_path: Path, registry: Url
) -> None:
    rng, writes = random.Random(12), list[Write]()
    arguments = ("--backbone", str(world.folder), "--registry", registry, *SERVER)
    data = [world.prefix(seed=900 + number) for number in range(WRITERS)]
    versions = [version_of(read_prefix(one)) for one in data]
    for number in range(SERVERS_KILLED):
        with ServerProcess(tmp_path, *arguments) as server, ExitStack() as stack:
            writers = []
            with server.wait_ready().client() as client:
                for index in range(WRITERS):
                    holder = f"holder-{number}-{index}"
                    assert upload(client, holder, data[index]).status_code == 201
                    name = f"kill-{number}-{index}"
                    writers.append(stack.enter_context(Writer(server, name, data[index], versions[index], holder)))
            for writer in writers:
                writer.wait_for(3, LATE_S)
            time.sleep(rng.uniform(0, 0.1))
            server.signal(signal.SIGKILL)
            server.wait()
            figures.cases += 1
        writes += [write for writer in writers for write in writer.writes]
        outcomes = check_writes(registry, writes, kept=False)
        figures.lost = sum(outcomes[f"not there after {status}"] for status in (200, 201))
        check_writes(registry, writes, kept=True)
    with ServerProcess(tmp_path, *arguments) as server:
        checkup = Checkup(server.wait_ready(), world, figures)
        checkup.round_over()
        said = [generate(server, f"kill-0-{index}-0").said for index in range(WRITERS)]
        check_writes(registry, writes, kept=True)
        figures.notes.append(f"{kind(registry)}, writes of killed servers: {dict(outcomes)}")
        for write in writes:
            if write.is_task and write.status == 201:
                assert figures.compare(generate(server, write.name).said, said[int(write.name.split("-")[2])]), write
        checkup.end()


def test_a_publish_from_the_command_line_that_is_killed_is_whole_or_not_there(
    figures: Figures, world: TinyWorld, tmp_path: Path, registry: Url
) -> None:
    file, rng = tmp_path / "prefix.safetensors", random.Random(13)
    file.write_bytes(world.prefix(seed=7, length=200))
    version = version_of(read_prefix(file.read_bytes()))
    usual_s = statistics.median(seconds_of(publisher(file, registry, f"whole-{number}")) for number in range(5))
    exits = Counter[int]()
    for number in range(PUBLISHERS_KILLED):
        exits[killed(publisher(file, registry, f"task-{number % 7}"), after_s=rng.uniform(0, usual_s))] += 1
        figures.cases += 1
        with closing(open_registry(registry)) as opened:
            tasks, audit = opened.tasks("default"), opened.audit("default", limit=10_000)
            for task in tasks:
                (info,) = task.versions
                assert figures.compare(version_of(read_prefix(opened.fetch("default", info.version))), version)
                assert task.aliases == {"production": version}
            # The same bytes a second time are no change; each task there was published once, and is said to be.
            assert Counter(entry.task for entry in audit) == {f"default/{task.name}": 1 for task in tasks}
    figures.notes.append(f"{kind(registry)}, exits of publishers: {dict(exits)}; {len(tasks)} tasks")
    assert exits[-signal.SIGKILL] > PUBLISHERS_KILLED / 4
    assert killed(publisher(file, registry, "last"), after_s=LATE_S) == 0
    assert killed(lambda: run("gc", "--retention", "0", "--yes", "--registry", registry), after_s=LATE_S) == 0
    with closing(open_registry(registry)) as opened:
        assert opened.gc(retention_s=0, dry_run=True, actor="ci").artifacts == ()
        assert {task.name for task in opened.tasks("default")} >= {"whole-0", "last"}


def kind(registry: Url) -> str:
    """For notes."""
    return "redis" if registry.startswith("redis") else "disk"


def publisher(file: Path, registry: Url, task: str) -> Callable[[], None]:
    """``prefixd prefixes publish`` of ``file``."""
    return lambda: run("publish", str(file), "--task", task, "--registry", registry)


def run(*arguments: str) -> None:
    """``prefixd prefixes`` with its output thrown away."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    prefixd.app(["prefixes", *arguments])


def seconds_of(work: Callable[[], None]) -> float:
    """How long a process that is left alone takes for ``work``."""
    began = time.monotonic()
    assert killed(work, after_s=LATE_S) == 0
    return time.monotonic() - began


def killed(work: Callable[[], None], *, after_s: float) -> int:
    """The exit code of a process that does ``work`` and is killed if it is still at it ``after_s`` seconds later."""
    process = FORK.Process(target=work)
    process.start()
    process.join(after_s)
    if process.is_alive():
        process.kill()
        process.join(LATE_S)
    assert process.exitcode is not None
    return process.exitcode
