"""Names that do not exist: they cost a read now and then, push out no known one, and take no other tenant's reads."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

import server.registry.catalog
import server.registry.freshness
from prefixes.errors import RegistryUnavailable, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import Resolved
from prefixes.spec import TaskRef
from server.registry.catalog import RESOLVE_THREADS, RESOLVES_EACH, Catalog
from tests.unit.server.registry.test_catalog import E2E, Announcing, Counting, publish, until, with_catalog


@pytest.fixture
def registry(tmp_path: Path) -> Counting:
    return Counting(open_registry(str(tmp_path / "registry")))


async def absent(catalog: Catalog, ref: TaskRef, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(TaskNotFound, match=ref.name):
            await catalog.resolve(ref)


@pytest.mark.parametrize(
    "ref", [TaskRef("default", "none"), TaskRef("default", "e2e", "canary"), TaskRef("acme", "e2e")]
)
def test_an_unknown_name_costs_one_read_for_its_time(
    registry: Counting, ref: TaskRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request for one read the registry."""
    monkeypatch.setattr(server.registry.freshness, "ABSENT_TTL_S", 60)
    publish(registry)

    async def test(catalog: Catalog) -> None:
        await absent(catalog, ref, 20)
        assert registry.resolved == 1

    with_catalog(registry, test, ttl=60)


def test_it_is_believed_for_a_short_time_where_changes_are_not_announced(registry: Counting) -> None:
    async def test(catalog: Catalog) -> None:
        await absent(catalog, E2E)
        version = publish(registry)  # as another process would
        await asyncio.sleep(server.registry.freshness.ABSENT_TTL_S + 0.01)
        assert (await catalog.resolve(E2E)).version == version
        assert registry.resolved == 2

    with_catalog(registry, test, ttl=60)


def test_an_announced_publish_ends_it_at_once_and_until_then_nothing_is_read(registry: Counting) -> None:
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        await absent(catalog, E2E, 10)
        await absent(catalog, TaskRef("default", "other"), 10)
        assert registry.resolved == 2
        version = publish(registry)
        registry.on_change("default", "e2e")
        await asyncio.sleep(0)
        assert (await catalog.resolve(E2E)).version == version
        await absent(catalog, TaskRef("default", "other"))
        assert registry.resolved == 3

    with_catalog(registry, test, ttl=0)


def test_after_a_break_of_the_announcements_it_is_asked_for_again(registry: Counting) -> None:
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        await absent(catalog, E2E, 2)
        version = publish(registry)
        registry.subscription.generation += 1
        assert (await catalog.resolve(E2E)).version == version

    with_catalog(registry, test, ttl=0)


def test_a_publish_of_this_process_is_seen_at_once_also_by_a_read_that_began_before(registry: Counting) -> None:
    async def test(catalog: Catalog) -> None:
        await absent(catalog, E2E)
        registry.go.clear()
        late = asyncio.create_task(catalog.resolve(TaskRef("default", "e2e", "canary")))
        await until(lambda: registry.resolved == 2)
        version = publish(registry)
        catalog.forget("default", "e2e")
        registry.go.set()
        with pytest.raises(TaskNotFound):
            await late
        assert (await catalog.resolve(E2E)).version == version
        registry.promote("default", "e2e", version, alias="canary")
        catalog.forget("default", "e2e")
        assert (await catalog.resolve(TaskRef("default", "e2e", "canary"))).version == version

    with_catalog(registry, test, ttl=60)


def test_what_is_absent_is_no_answer_while_the_registry_is_away(registry: Counting) -> None:
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        await absent(catalog, E2E)
        registry.broken = True
        await until(lambda: not catalog._link.up)
        with pytest.raises(RegistryUnavailable):
            await catalog.resolve(E2E)

    with_catalog(registry, test, ttl=0.5)


def test_unknown_names_are_bounded_and_push_out_no_known_one(
    registry: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.registry.catalog, "MAX_ABSENT", 3)
    monkeypatch.setattr(server.registry.catalog, "MAX_KNOWN", 1)
    monkeypatch.setattr(server.registry.freshness, "ABSENT_TTL_S", 60)
    publish(registry)

    async def test(catalog: Catalog) -> None:
        await catalog.resolve(E2E)
        for number in (0, 1, 2, 0, 3, 0, 4):
            await absent(catalog, TaskRef("default", f"none-{number}"))
        assert [ref.name for ref in catalog._absent] == ["none-3", "none-0", "none-4"]
        read = registry.resolved
        await catalog.resolve(E2E)
        await absent(catalog, TaskRef("default", "none-3"))
        assert registry.resolved == read

    with_catalog(registry, test, ttl=60)


def test_one_tenants_unknown_names_leave_reads_to_the_others(
    registry: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All eight threads read its names, and every other tenant waited behind them all."""
    version, release, running, read = publish(registry), threading.Event(), list[str](), list[str]()

    def resolve(ref: TaskRef) -> Resolved:
        running.append(ref.name)
        if ref.name.startswith("none"):
            assert release.wait(20)
        read.append(ref.name)
        resolved: Resolved = registry._registry.resolve(ref)
        return resolved

    monkeypatch.setattr(registry, "resolve", resolve)
    monkeypatch.setattr(server.registry.catalog, "WAIT_S", 20.0)

    async def test(catalog: Catalog) -> None:
        flood = [asyncio.create_task(absent(catalog, TaskRef("default", f"none-{number}"))) for number in range(200)]
        await until(lambda: len(running) == RESOLVES_EACH < RESOLVE_THREADS)
        assert (await catalog.resolve(E2E, "acme")).version == version
        assert len(running) == RESOLVES_EACH + 1
        release.set()
        await asyncio.gather(*flood)
        assert len(read) == 201

    with_catalog(registry, test, ttl=60)
