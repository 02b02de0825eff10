"""With ten thousand tasks registered, a task costs what it costs with ten: counted, never timed."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixes.artifact import write_prefix
from prefixes.backbone import Backbone
from prefixes.errors import TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.registry.disk.registry import DiskRegistry
from prefixes.spec import TaskRef
from server.engine.types import GenerationRequest, PrefixKey, SamplingParams
from server.registry.catalog import Catalog
from server.registry.link import RegistryLink
from server.tiers.tiers import PrefixTiers
from tests.support import disk
from tests.support.engine import make_engine, run, tiny_backbone, wait_for_loads
from tests.support.lines import Lines
from tests.support.prefixes import make_prefix
from tests.support.redis_front import Front
from tests.support.redis_registry import DATA, VERSIONS, multiply, opened, publish
from tests.support.redis_server import RedisServer

FEW, MANY = 10, 10_000
SCALES = [MANY, pytest.param(100_000, marks=pytest.mark.slow)]
MISSING = "sha256:" + "0" * 64

CALLS: dict[str, Callable[[Store], object]] = {
    "resolve": lambda registry: registry.resolve(TaskRef.parse("task-000001")),
    "resolve a version": lambda registry: registry.resolve(TaskRef.parse(f"task-000001@{VERSIONS[0]}")),
    "resolve no such task": lambda registry: refused(lambda: registry.resolve(TaskRef.parse("task-nothing"))),
    "fetch": lambda registry: registry.fetch("default", VERSIONS[0]),
    "fetch no such digest": lambda registry: refused(lambda: registry.fetch("default", MISSING)),
    "check": lambda registry: registry.check(),
}
WRITES: dict[str, Callable[[Store], object]] = {
    "publish": lambda registry: publish(registry, 1, name="task-000002"),
    "rollback": lambda registry: registry.rollback("default", "task-000002"),
    "promote": lambda registry: registry.promote("default", "task-000002", VERSIONS[1]),
    "delete": lambda registry: registry.delete("default", "task-000002"),
    "undelete": lambda registry: registry.undelete("default", "task-000002"),
}


def names(number: int) -> list[str]:
    return [f"task-{index:06d}" for index in range(1, number)]


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(TaskNotFound):
        call()


# --- Redis: commands, and bytes to and fro ---


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        for _ in range(100):  # a connection's number is in the answer to HELLO: three digits in every test
            with server.client() as client:
                client.ping()
        yield server


def commands(client: Any) -> Counter[str]:
    """Calls of each command since the server started, those within scripts included, but for ours."""
    stats = client.info("commandstats").items()
    return Counter({name: values["calls"] for name, values in stats if name != "cmdstat_info"})


def costs_in_redis(server: RedisServer, number: int) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """Per call: how many of which commands, and how many bytes, with ``number`` tasks registered."""
    server.flush()
    costs = {}
    with (
        Front(server.server_port) as front,
        server.client() as client,
        opened(f"redis://127.0.0.1:{front.port}") as registry,
    ):
        publish(registry, 0, name="task-000000")
        multiply(client, "default", "task-000000", names(number))
        assert client.scard("prefixd:{default}:tasks") == number
        for name, call in (CALLS | WRITES).items():
            if name in CALLS:
                call(registry)  # connected now, both ways
            before, carried = commands(client), dict(front.carried)
            call(registry)
            sent = {side: front.carried[side] - carried[side] for side in carried}
            counts = 2 if name == "undelete" else 0  # a number of tasks that Redis answers has more digits
            sent["answers"] -= counts * len(str(client.scard("prefixd:{default}:tasks") - 1))
            costs[name] = dict(commands(client) - before), sent
    return costs


def contents(client: Any) -> dict[str, object]:
    """Every key and what it holds, times and the marks of changes, which end by themselves, left out."""
    read: dict[bytes, Callable[[bytes], object]] = {
        b"string": client.get,
        b"set": lambda key: sorted(client.smembers(key)),
        b"stream": lambda key: [fields for _, fields in client.xrange(key)],
        b"hash": lambda key: sorted(item for item in client.hgetall(key).items() if item[0] != b"at"),
    }
    keys = [key for key in client.scan_iter(count=1000) if b":done:" not in key]
    texts = {key.decode(): repr(read[client.type(key)](key)) for key in keys}
    return {key: re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text) for key, text in texts.items()}


def test_tasks_that_tests_register_at_once_are_as_if_published(server: RedisServer) -> None:
    with server.client() as client:
        states = []
        for at_once in (False, True):
            server.flush()
            with opened(server.url, registry_id="same") as registry:
                publish(registry, 0, name="task-000000")
                if at_once:
                    multiply(client, "default", "task-000000", names(4))
                else:
                    for name in names(4):
                        publish(registry, 0, name=name)
            states.append(contents(client))
    assert states[0] == states[1]
    assert len(states[0]) == 13  # four tasks, an artifact, who names it; the tenant's five others; the registry's two


@pytest.mark.parametrize("many", SCALES)
def test_in_redis_no_call_costs_more_commands_or_bytes_with_more_tasks(server: RedisServer, many: int) -> None:
    few, costs = costs_in_redis(server, FEW), costs_in_redis(server, many)
    assert costs == few
    for calls, carried in few.values():
        assert 0 < sum(calls.values()) < 40
        assert carried["questions"] > 0
    assert few["fetch"][1]["answers"] > len(DATA[0])


# --- a folder: touches of the file system ---


def touches_of_disk(root: Path, number: int) -> dict[str, int]:
    """Per call: how often the file system is touched, with ``number`` tasks in a folder just opened.

    The tasks' files are copies of one that was published: that it is a task is seen by listing them.
    """
    registry = DiskRegistry(root)
    publish(registry, 0, name="task-000000")
    publish(registry, 1, name="task-000002")
    publish(registry, 0, name="task-000002")
    index = root / "tenants/default/tasks/task-000000.json"
    text = index.read_text()
    for name in names(number):
        if name != "task-000002":
            index.with_name(f"{name}.json").write_text(text.replace("task-000000", name))
    assert len(registry.tasks()) == number
    costs = {}
    for name, call in (CALLS | WRITES).items():
        touched: list[Path] = []
        with disk.watched(lambda _, path: touched.append(path)):  # noqa: B023
            call(DiskRegistry(root))
        costs[name] = len(touched)
    return costs


def test_on_disk_no_call_touches_more_files_with_more_tasks(tmp_path: Path) -> None:
    few, many = touches_of_disk(tmp_path / "few", FEW), touches_of_disk(tmp_path / "many", MANY)
    assert few == many
    assert all(0 < count < 1000 for count in few.values()), few


# --- the server: lines of Python ---


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


def lines_of_a_server(url: str, backbone: Backbone, number: int) -> tuple[int, list[int]]:
    """Lines for resolving a known task, and for each step of rows of four tasks, with ``number`` known to the catalog.

    All these are resolved first, as requests would, and four are loaded and decoded.
    """

    async def serve(registry: Store) -> tuple[int, list[int]]:
        link = RegistryLink(registry)
        catalog = Catalog(link, backbone.spec, PrefixTiers(registry.fetch, ()), alias_ttl_s=3600, max_stale_s=3600)
        link.start(lambda *_: None)
        refs = [TaskRef.parse(name) for name in ("task-000000", *names(number))]
        for begin in range(0, number, 100):
            await asyncio.gather(*(catalog.resolve(ref) for ref in refs[begin : begin + 100]))
        resolved = [await catalog.resolve(ref) for ref in refs[:4]]
        engine = make_engine(backbone, SimpleNamespace(load=catalog.load))  # type: ignore[arg-type]

        def request(index: int) -> GenerationRequest:
            found = resolved[index % len(resolved)]
            key = PrefixKey(found.tenant, found.version)
            return GenerationRequest(
                f"request-{index}", "default", (1, 2, 3 + index), SamplingParams(max_new_tokens=8), key, found.spec
            )

        try:
            run(engine, [request(index) for index in range(8)])  # everything has run once
            for index in range(8):
                engine.add(request(index))
            wait_for_loads(engine)
            steps = []
            while engine.requests:
                steps.append(Lines().of(engine.step))
        finally:
            engine.close()
            link.close()
        return Lines().of(lambda: _run(catalog.resolve(refs[1]))), steps

    with closing(open_registry(url)) as registry:
        return asyncio.run(serve(registry))


def _run(coroutine: Any) -> None:
    """A coroutine that waits for nothing."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


@pytest.mark.parametrize("known", [1000, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_step_and_a_known_reference_cost_the_same_with_more_tasks(
    server: RedisServer, backbone: Backbone, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.registry.freshness.ANNOUNCED_TTL_S", 3600.0)  # to make 10,000 known takes long
    costs = []
    for number in (FEW, MANY):
        server.flush()
        with opened(server.url) as registry, server.client() as client:
            for index in range(4):
                prefix = make_prefix(backbone.spec, seed=index)
                registry.publish("default", f"task-00000{index}", write_prefix(prefix), record={})
            multiply(client, "default", "task-000000", names(number)[3:])
            assert client.scard("prefixd:{default}:tasks") == number
        costs.append(lines_of_a_server(server.url, backbone, min(number, known)))
    assert costs[0] == costs[1]
    assert costs[0][0] > 5
    assert len(costs[0][1]) >= 8
    assert all(lines > 100 for lines in costs[0][1])


def test_the_count_of_lines_sees_a_loop_over_tasks() -> None:
    few, many = ({str(index): index for index in range(number)} for number in (FEW, MANY))
    for loop in (lambda tasks: [x for x in tasks if x == "1"], lambda tasks: sum(x == "1" for x in tasks)):
        assert Lines().of(lambda: loop(many)) > Lines().of(lambda: loop(few)) + MANY // 2  # noqa: B023
