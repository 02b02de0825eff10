"""What a failed registry leaves behind: no half change, none that was refused, and nobody who must be restarted."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.outage import LATE_S, Scene, arguments, scene
from tests.support.redis_front import Front
from tests.support.redis_server import RedisServer, wait_until
from tests.support.server import ServerProcess, TinyWorld, make_world, metric, wait_for_metric
from tests.support.traffic import Repeated, Requests, Writer, ask, check_writes, generate, publish

SEEN_S = 1.0
"""Within this long every replica serves what was promoted."""
EXIT_S = 20.0
"""Tells a hang; what is waited for, one answer of Redis, takes a second."""

LARGE = 2000
"""A prefix of this length is a megabyte."""

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """One family is enough."""
    return make_world(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def stage(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(world, tmp_path_factory.mktemp("scene")) as made:
        yield made


@pytest.mark.parametrize("fault", ["stopped", "down", pytest.param("flushed", marks=pytest.mark.slow)])
def test_a_write_that_was_refused_has_not_happened_and_one_that_was_not_has(
    stage: Scene, fault: str, record_property: Record
) -> None:
    with ExitStack() as stack:
        writers = []
        for number, server in enumerate((stage.patient, stage.impatient) * 2):
            name, data = f"{fault}-{number}", stage.world.prefix(seed=900 + number)
            holder = f"{name}-holder"  # each its own: a task has a hundred aliases, and a busy machine time for them
            version = publish(server, holder, data).body["version"]
            writers.append(stack.enter_context(Writer(server, name, data, version, holder)))
        for writer in writers:
            writer.wait_for(3, LATE_S)
        with stage.broken(fault):
            broken_at = time.monotonic()
            for writer in writers:
                wait_until(lambda: writer.refused >= 10, lambda: f"{writer.writes[-3:]}", LATE_S)  # noqa: B023
        for writer in writers:
            writer.wait_for(3, LATE_S)
    assert [fault for writer in writers for fault in writer.faults] == []
    writes = [write for writer in writers for write in writer.writes]
    refused = [write for write in writes if write.status == 503]
    late = [write for write in refused if write.began > broken_at]
    assert len(late) >= 30
    record_property("all", dict(check_writes(stage.redis.url, writes, kept=fault != "flushed")))
    assert set(check_writes(stage.redis.url, late, kept=False)) == {"not there after 503"}
    # Those under way when it broke may have lost their answer alone: whole then, and one at most for each writer.
    assert sum(write.began <= stage.breaking_at for write in refused) <= len(writers)
    under_way = check_writes(stage.redis.url, [write for write in refused if write.began <= broken_at], kept=False)
    record_property("under_way", dict(under_way))


@contextmanager
def unannounced(redis: RedisServer, how: str) -> Iterator[None]:
    """Connections that announcements come on are ended, again and again, or from now on ``refused``."""
    with ExitStack() as stack:
        client = stack.enter_context(redis.client())
        if how == "refused":
            client.execute_command("ACL SETUSER default -subscribe")
            stack.callback(client.execute_command, "ACL SETUSER default +subscribe")

        def kill() -> None:
            client.client_kill_filter(_type="pubsub")
            time.sleep(0.02)

        stack.enter_context(Repeated(kill))
        yield


@pytest.mark.parametrize("how", ["ended", "refused"])
def test_a_promote_is_seen_without_announcements(stage: Scene, how: str, record_property: Record) -> None:
    replicas = (stage.patient, stage.impatient)
    first, second = (
        publish(stage.patient, f"polled-{how}", stage.world.prefix(seed=seed)).body["version"] for seed in (801, 802)
    )
    lines = len(stage.patient.log_lines())
    taken = []
    with unannounced(stage.redis, how):
        if how == "refused":
            for server in replicas:
                wait_for_metric(server, "prefixd_registry_subscribed", 0)
        for move in range(8):
            mover, other = replicas[:: 1 if move % 2 else -1]
            target = first if move % 2 == 0 else second
            assert generate(other, f"polled-{how}").status == 200
            ask(mover, "POST", f"/prefixes/polled-{how}/promote", json={"version": target})
            began = time.monotonic()
            while generate(other, f"polled-{how}").body["version"] != target:
                assert time.monotonic() - began < LATE_S
            taken.append(time.monotonic() - began)
        if how == "refused":
            assert [metric(server, "prefixd_registry_subscribed") for server in replicas] == [0, 0]
            told = [line["message"] for line in stage.patient.log_lines()[lines:]]
            assert told.count("registry announcements interrupted") == 1
    assert sorted(taken)[len(taken) // 2] < SEEN_S
    record_property("seconds", sorted(taken))
    for server in replicas:
        wait_for_metric(server, "prefixd_registry_subscribed", 1)
    told = [line["message"] for line in stage.patient.log_lines()[lines:]]
    assert told.count("registry announcements interrupted") == told.count("registry announcements again")


@pytest.fixture
def start(world: TinyWorld, stage: Scene, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts further replicas on the scene's Redis."""
    with ExitStack() as stack:

        def start(url: str = stage.redis.url) -> ServerProcess:
            process = ServerProcess(tmp_path, "--registry", url, *arguments(world))
            return stack.enter_context(process).wait_ready()

        yield start


class Narrow(Front):
    """Does not let an artifact through."""

    def __init__(self, upstream: int) -> None:
        self.stuck = threading.Event()
        super().__init__(upstream)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await reader.read(1 << 16):
            if not answers and len(data) > 1 << 14:
                self.stuck.set()
                await asyncio.sleep(3600)
            writer.write(data)
            await writer.drain()


def test_a_replica_stops_in_time_while_its_redis_does_not_answer(
    stage: Scene, start: Callable[..., ServerProcess], record_property: Record
) -> None:
    """Whatever waits for Redis: the probe, the subscription, requests, loads, and an upload that is half there."""
    with ExitStack() as stack:
        front = stack.enter_context(Narrow(stage.redis.server_port))
        server = start(f"redis://127.0.0.1:{front.port}")
        stage.introduce(server, "resident")
        stack.enter_context(Repeated(lambda: publish(server, "large", stage.world.prefix(length=LARGE))))
        assert front.stuck.wait(LATE_S)
        stack.enter_context(stage.broken("stopped"))
        for call in (lambda: generate(server, "resident"), lambda: generate(server, "nobody")):
            stack.enter_context(Repeated(call))
        time.sleep(0.3)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait(EXIT_S) == 0
        record_property("seconds", time.monotonic() - began)


@pytest.mark.slow
def test_a_replica_that_is_killed_while_it_publishes_leaves_whole_tasks_alone(
    stage: Scene, start: Callable[..., ServerProcess]
) -> None:
    server, resident = start(), stage.expected["resident"][0]
    assert resident is not None
    with ExitStack() as stack:
        requests = stack.enter_context(Requests(stage.patient, "resident", stage.expected["resident"]))
        writers = [
            stack.enter_context(Writer(server, f"killed-{number}", stage.world.prefix(seed=700 + number), resident))
            for number in range(3)
        ]
        for writer in writers:
            writer.wait_for(4, LATE_S)
        server.signal(signal.SIGKILL)
        server.wait()
        requests.wait_for(5, LATE_S)
    assert requests.faults == []
    check_writes(stage.redis.url, [write for writer in writers for write in writer.writes], kept=True)
    for writer in writers:
        for write in writer.writes:
            if write.is_task and write.status == 201:
                assert generate(stage.impatient, write.name).status == 200
    cleaned = ask(stage.patient, "POST", "/admin/gc", admin=True, json={"retention_s": 0, "confirm": True})
    assert cleaned.status == 200
    check_writes(stage.redis.url, [write for writer in writers for write in writer.writes], kept=True)
