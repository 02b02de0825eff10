"""A real server records what it answered: all of it when it is drained, and when it is killed all but the last."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from prefixes.registry import open_registry
from prefixes.usage.model import Counts
from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess, events, make_world
from tests.support.traffic import ask, generate, publish

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


def mixed(server: ServerProcess, task: str, found: list[Counts]) -> None:
    """Every way to ask, by a client that counts what it is told."""
    short: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3}
    sampled = {**short, "do_sample": True, "num_return_sequences": 2}

    def note(usage: dict[str, int]) -> None:
        found.append(Counts(1, usage["input_tokens"], usage["prefix_tokens"], usage["output_tokens"]))

    for parameters in (short, sampled, {**short, "num_beams": 3, "num_return_sequences": 2}):
        note(generate(server, task, parameters).body["usage"])
    items = [{"task": name, "input": "x", "parameters": short} for name in (task, None, "none/at-all")]
    for item in ask(server, "POST", "/generate/batch", json={"items": items}).body["items"]:
        if "error" not in item:
            note(item["usage"])
    with server.client() as client:
        body = {"task": task, "input": "y", "parameters": sampled, "stream": True}
        with client.stream("POST", "/generate", json=body) as answer:
            note(next(data for name, data in events(answer.iter_lines()) if name == "done")["usage"])
    told = ask(server, "POST", "/v1/completions", json={"model": task, "prompt": ["a", "bc"], "max_tokens": 3})
    usage, prefix = told.body["usage"], found[0].prefix_tokens
    found.append(Counts(2, usage["prompt_tokens"], 2 * prefix, usage["completion_tokens"]))


def test_two_replicas_and_a_redis_that_is_away_record_exactly_what_clients_counted(tmp_path: Path) -> None:
    world, found = make_world(tmp_path / "backbone"), list[Counts]()
    with RedisServer(append_only=True) as redis, ExitStack() as stack:
        arguments = ("--backbone", str(world.folder), "--registry", redis.url, "--threads", "1", "--kernels", "torch")
        replicas = []
        for number in range(2):
            (tmp_path / str(number)).mkdir()
            server = ServerProcess(tmp_path / str(number), *arguments, "--usage-flush-s", "0.05")
            replicas.append(stack.enter_context(server))
        for server in replicas:
            server.wait_ready()
        publish(replicas[0], "e2e", world.prefix())
        for server in replicas:
            mixed(server, "default/e2e", found)
        redis.stop()
        for server in replicas:  # known tasks are served, and counted
            mixed(server, "default/e2e", found)
        redis.start()
        mixed(replicas[1], "default/e2e", found)
        wait_for(lambda: total(redis.url) == sum(found, Counts()))
        mixed(replicas[0], "default/e2e", found)
        for server in replicas:
            server.signal(signal.SIGTERM)
        assert [server.wait() for server in replicas] == [0, 0]
        assert total(redis.url) == sum(found, Counts())


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
