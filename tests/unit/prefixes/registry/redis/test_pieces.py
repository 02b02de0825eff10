"""Artifacts go into Redis and out of it in pieces: no command takes long, and one is stored whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from prefixes.artifact import version_of, write_prefix
from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry.redis import blobs
from prefixes.registry.redis.blobs import PIECE_BYTES, PIECES_S
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from tests.support.prefixes import make_backbone_spec, make_prefix
from tests.support.redis_front import Front
from tests.support.redis_registry import assert_in_step, opened
from tests.support.redis_server import RedisServer

KEYS = TenantKeys("default")
PREFIX = make_prefix(length=400)
DATA, VERSION = write_prefix(PREFIX), version_of(PREFIX)
PIECE = len(DATA) // 5


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "PIECE_BYTES", PIECE)


def publish(registry: RedisRegistry) -> None:
    registry.publish("default", "e2e", DATA, record={})


def sent(registry: RedisRegistry, monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Call ``before`` with the name of every command ahead of it, of those that store artifacts."""
    execute = registry.commands._writes.execute_command

    def watched(*command: Any, **options: Any) -> Any:
        before(command[0])
        return execute(*command, **options)

    monkeypatch.setattr(registry.commands._writes, "execute_command", watched)


def assert_nothing_is_left(registry: RedisRegistry, client: Any) -> None:
    assert list(client.scan_iter(match=f"{KEYS.pieces(VERSION, '*')}")) == []
    with pytest.raises(TaskNotFound):
        registry.fetch("default", VERSION)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_no_command_carries_more_than_a_piece(
    registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    """An artifact of 512 MiB was one SET: while Redis wrote it to its disk, probes and reads of all failed."""
    monkeypatch.setattr(blobs, "PIECE_BYTES", (len(DATA) + extra) // 5)
    largest = 0
    for sender in (registry.commands._writes, registry.commands._reads):
        execute = sender.execute_command

        def watched(*command: Any, execute: Any = execute, **options: Any) -> Any:
            nonlocal largest
            answer = execute(*command, **options)
            sizes = (len(part) for part in (*command, answer) if isinstance(part, bytes))
            largest = max(largest, *sizes, 0)
            return answer

        monkeypatch.setattr(sender, "execute_command", watched)
    publish(registry)
    assert registry.fetch("default", VERSION) == DATA
    assert largest == blobs.PIECE_BYTES
    assert client.ttl(KEYS.blob(VERSION)) == -1, "it is there for good"
    assert list(client.scan_iter(match=KEYS.pieces(VERSION, "*"))) == []
    assert_in_step(client, registry, "default")
    assert 5 * PIECE_BYTES < 512 << 20


def test_a_slow_line_needs_to_carry_a_piece_in_time_and_not_the_artifact(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command had to be sent whole within its time-out, whatever its size."""
    backbone = make_backbone_spec()
    large = make_prefix(backbone, length=20_000)
    data, version = write_prefix(large), version_of(large)
    with Front(server.server_port) as front, opened(f"redis://127.0.0.1:{front.port}?timeout_s=0.3") as registry:
        front.pace = len(data) // 6  # six seconds for all; a write may take three, a read one
        monkeypatch.setattr(blobs, "PIECE_BYTES", len(data) // 40)
        registry.publish("default", "e2e", data, record={})
        assert registry.fetch("default", version) == data


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("number", range(2, 7))
def test_a_writer_that_fails_on_the_way_leaves_nothing(
    registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    count = 0

    def fail(command: str) -> None:
        nonlocal count
        count += command == "EVALSHA"
        if command == "EVALSHA" and count == number:
            raise redis.TimeoutError

    publish(registry)  # Redis has the scripts now
    registry.delete("default", "e2e")
    registry.gc(retention_s=0)
    with monkeypatch.context() as patched:
        sent(registry, patched, fail)
        with pytest.raises(RegistryUnavailable):
            publish(registry)
    assert count == number
    assert_nothing_is_left(registry, client)
    publish(registry)
    assert registry.fetch("default", VERSION) == DATA


@pytest.mark.usefixtures("pieces")
def test_what_a_killed_writer_left_ends_by_itself(
    registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(command: str) -> None:
        seen.extend(client.ttl(key) for key in client.scan_iter(match=KEYS.pieces(VERSION, "*")))
        if len(seen) == 3:
            monkeypatch.setattr(registry.commands._writes, "unlink", lambda key: None)
            raise KeyboardInterrupt

    sent(registry, monkeypatch, look)
    with pytest.raises(KeyboardInterrupt):
        publish(registry)
    assert all(0 < ttl <= PIECES_S for ttl in seen)
    (left,) = client.scan_iter(match=KEYS.pieces(VERSION, "*"))
    assert 0 < client.ttl(left) <= PIECES_S
    assert not client.exists(KEYS.blob(VERSION))


@pytest.mark.usefixtures("pieces")
def test_a_piece_that_is_sent_twice_is_there_once(
    registry: RedisRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its answer is lost and redis-py sends it again."""
    execute, twice = registry.commands._writes.execute_command, 0

    def repeated(*command: Any, **options: Any) -> Any:
        nonlocal twice
        if command[0] == "EVALSHA":
            twice += 1
            execute(*command, **options)
        return execute(*command, **options)

    monkeypatch.setattr(registry.commands._writes, "execute_command", repeated)
    publish(registry)
    assert twice > 5
    assert registry.fetch("default", VERSION) == DATA


@pytest.mark.usefixtures("pieces")
def test_pieces_that_a_new_master_has_not_heard_of_are_no_artifact(
    registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = False

    def lose(command: str) -> None:
        nonlocal lost
        for key in client.scan_iter(match=KEYS.pieces(VERSION, "*")):
            if client.strlen(key) == 2 * PIECE and not lost:
                client.set(key, client.get(key)[:PIECE], ex=60)
                lost = True

    with monkeypatch.context() as patched:
        sent(registry, patched, lose)
        with pytest.raises(RegistryUnavailable, match=f"expected {3 * PIECE} bytes .* got {PIECE}"):
            publish(registry)
    assert lost
    assert_nothing_is_left(registry, client)


@pytest.mark.usefixtures("pieces")
def test_an_artifact_that_goes_while_it_is_read_is_not_there(
    registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry)
    execute = registry.commands._reads.execute_command

    def gone(*command: Any, **options: Any) -> Any:
        if command[0] == "STRLEN":
            answer = execute(*command, **options)
            registry.delete("default", "e2e")
            registry.gc(retention_s=0)
            return answer
        return execute(*command, **options)

    monkeypatch.setattr(registry.commands._reads, "execute_command", gone)
    with pytest.raises(TaskNotFound):
        registry.fetch("default", VERSION)
