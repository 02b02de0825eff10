"""The total of what a tenant has: judged by the script that commits, and never kept wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prefixes.errors import QuotaExceeded, RegistryUnavailable
from prefixes.registry.quota import Kept, kept_by
from prefixes.registry.redis import kept, writer
from prefixes.registry.redis.commands import RedisCommands
from prefixes.registry.redis.kept import ATTEMPTS, kept_of
from prefixes.registry.redis.keys import TenantKeys
from prefixes.registry.redis.registry import RedisRegistry
from prefixes.tenancy.limits import Limits
from tests.support.redis_registry import DATA, opened, publish
from tests.support.redis_server import RedisServer

KEYS, SIZE = TenantKeys("default"), len(DATA[0])


def after_the_look(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], times: int = 1) -> list[int]:
    """Call ``act`` after a writer has read the total and before it commits; one entry for each look."""
    looks: list[int] = []

    def looked(commands: RedisCommands, tenant: str) -> Kept:
        found = kept_of(commands, tenant)
        looks.append(1)
        if len(looks) <= times:
            act()
        return found

    monkeypatch.setattr(writer, "kept_of", looked)
    return looks


@pytest.mark.parametrize(
    "quota", [Limits(registry_tasks=2), Limits(registry_versions=2), Limits(registry_bytes=2 * SIZE)]
)
def test_the_last_place_is_taken_once(
    registry: RedisRegistry, server: RedisServer, monkeypatch: pytest.MonkeyPatch, quota: Limits
) -> None:
    publish(registry, 0)
    with opened(server.url) as other:
        looks = after_the_look(monkeypatch, lambda: publish(other, 1, name="quicker"))
        with pytest.raises(QuotaExceeded, match="got "):
            publish(registry, 2, name="late", quota=quota)
    assert len(looks) == 2
    assert [task.name for task in registry.tasks()] == ["e2e", "quicker"]


def test_a_quicker_writer_that_leaves_room_stops_nobody(
    registry: RedisRegistry, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, 0)
    with opened(server.url) as other:
        looks = after_the_look(monkeypatch, lambda: publish(other, 1, name="quicker"))
        publish(registry, 2, name="late", quota=Limits(registry_tasks=3))
    assert len(looks) == 1
    assert kept_of(registry.commands, "default") == Kept(3, 3, 3 * SIZE)


def test_a_change_by_an_older_release_between_look_and_commit_is_counted(
    registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds to the audit and not to the total."""
    publish(registry, 0)
    looks = after_the_look(monkeypatch, lambda: client.xadd(KEYS.audit, client.xrange(KEYS.audit)[0][1]))
    publish(registry, 1, quota=Limits(registry_versions=2))
    assert len(looks) == 2
    assert kept_of(registry.commands, "default") == Kept(1, 2, 2 * SIZE)


def test_a_total_that_is_out_of_date_is_not_kept(registry: RedisRegistry, client: Any) -> None:
    publish(registry, 0, 1)
    client.xadd(KEYS.audit, client.xrange(KEYS.audit)[0][1])
    publish(registry, 2)
    assert not client.exists(KEYS.total)
    assert kept_of(registry.commands, "default") == Kept(1, 3, 3 * SIZE)
    assert client.exists(KEYS.total)


def test_what_is_counted_while_others_write_is_counted_again_and_given_up_in_the_end(
    registry: RedisRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, 0)
    client.delete(KEYS.total)
    disturbed: list[int] = []

    def counting(*given: Any) -> Kept:
        disturbed.append(1)
        if len(disturbed) < enough:
            client.xadd(KEYS.audit, client.xrange(KEYS.audit)[0][1])
        return kept_by(*given)

    monkeypatch.setattr(kept, "kept_by", counting)
    enough = 2
    assert kept_of(registry.commands, "default") == Kept(1, 1, SIZE) and len(disturbed) == 2
    client.delete(KEYS.total)
    disturbed.clear()
    enough = 100
    with pytest.raises(RegistryUnavailable, match="try again"):
        kept_of(registry.commands, "default")
    assert len(disturbed) == ATTEMPTS


def test_a_large_total_is_exact(registry: RedisRegistry, client: Any) -> None:
    publish(registry, 0)
    client.hset(KEYS.total, "bytes", 10**15 - 1)
    publish(registry, 1)
    assert kept_of(registry.commands, "default").size == 10**15 - 1 + SIZE
