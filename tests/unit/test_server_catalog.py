"""The catalog over a real disk registry: freshness, sharing of reads, verified loads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import write_prefix
from prefixes.errors import EngineFailure, IncompatiblePrefix, RegistryUnavailable, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import Resolved
from prefixes.spec import TaskRef
from server.assembly import publish_demo
from server.catalog import Catalog
from server.engine.types import PrefixKey
from tests.support.prefixes import make_backbone_spec, make_prefix

SPEC = make_backbone_spec()


class Counting:
    """A registry that counts and can hold its reads back."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self.resolved = 0
        self.go = threading.Event()
        self.go.set()
        self.broken = False

    def resolve(self, ref: TaskRef) -> Resolved:
        self.resolved += 1
        assert self.go.wait(5)
        if self.broken:
            raise RegistryUnavailable("down")
        resolved: Resolved = self._registry.resolve(ref)
        return resolved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)


@pytest.fixture
def registry(tmp_path: Path) -> Counting:
    return Counting(open_registry(str(tmp_path / "registry")))


def publish(registry: Any, seed: int = 0, spec: Any = SPEC, name: str = "e2e") -> str:
    version: str = registry.publish("default", name, write_prefix(make_prefix(spec, seed=seed)), record={}).version
    return version


def with_catalog(registry: Any, test: Callable[[Catalog], Awaitable[None]], ttl: float = 0.5) -> None:
    async def run() -> None:
        await test(Catalog(registry, SPEC, alias_ttl_s=ttl))

    asyncio.run(run())


E2E = TaskRef("default", "e2e")


def test_an_alias_is_believed_for_its_time_and_a_promote_elsewhere_is_seen_after_it(registry: Counting) -> None:
    first, second = publish(registry, 0), publish(registry, 1)

    async def test(catalog: Catalog) -> None:
        assert (await catalog.resolve(E2E)).version == second
        registry.promote("default", "e2e", first)  # as another process would
        assert (await catalog.resolve(E2E)).version == second
        assert registry.resolved == 1
        await asyncio.sleep(0.11)
        assert (await catalog.resolve(E2E)).version == first

    with_catalog(registry, test, ttl=0.1)


def test_a_change_of_this_process_is_seen_at_once(registry: Counting) -> None:
    first, second = publish(registry, 0), publish(registry, 1)

    async def test(catalog: Catalog) -> None:
        assert (await catalog.resolve(E2E)).version == second
        registry.promote("default", "e2e", first)
        catalog.forget("default", "e2e")
        assert (await catalog.resolve(E2E)).version == first

    with_catalog(registry, test, ttl=60)


def test_reads_of_one_reference_at_one_time_are_one_read(registry: Counting) -> None:
    publish(registry)
    registry.go.clear()

    async def test(catalog: Catalog) -> None:
        waiting = [asyncio.create_task(catalog.resolve(E2E)) for _ in range(20)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()  # one who leaves does not take the others along
        registry.go.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(isinstance(result, Resolved) for result in results) == 19
        assert registry.resolved == 1

    with_catalog(registry, test)


def test_errors_are_not_remembered(registry: Counting) -> None:
    async def test(catalog: Catalog) -> None:
        with pytest.raises(TaskNotFound):
            await catalog.resolve(E2E)
        publish(registry)
        registry.broken = True
        with pytest.raises(RegistryUnavailable):
            await catalog.resolve(E2E)
        registry.broken = False
        await catalog.resolve(E2E)

    with_catalog(registry, test, ttl=60)


def test_a_task_for_another_backbone_is_refused_before_anything_runs(registry: Counting) -> None:
    publish(registry, spec=make_backbone_spec(fingerprint="sha256:" + "cd" * 32))

    async def test(catalog: Catalog) -> None:
        with pytest.raises(IncompatiblePrefix, match="fingerprint"):
            await catalog.resolve(E2E)

    with_catalog(registry, test)


def test_load_verifies_what_it_fetches(registry: Counting, tmp_path: Path) -> None:
    version = publish(registry)

    async def test(catalog: Catalog) -> None:
        assert catalog.load(PrefixKey("default", version)).spec.fingerprint == SPEC.fingerprint
        with pytest.raises(TaskNotFound):
            catalog.load(PrefixKey("other", version))
        blob = next(tmp_path.rglob("*.safetensors"))
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.chmod(0o600)
        blob.write_bytes(data)
        with pytest.raises(EngineFailure, match="damaged: digest: expected"):
            catalog.load(PrefixKey("default", version))

    with_catalog(registry, test)


def test_a_demo_is_published_beside_other_demos_and_never_twice(registry: Counting, tmp_path: Path) -> None:
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for seed, (demo, name) in enumerate((("one", "e2e"), ("one", "dart"), ("two", "news"))):
        path = folders[demo] / "prefixes" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write_prefix(make_prefix(SPEC, seed=seed)))

    def names() -> list[str]:
        return [task.name for task in registry.tasks()]

    publish_demo(registry, "one", folders)
    assert names() == ["dart", "e2e"]
    assert registry.resolve(E2E).spec.fingerprint == SPEC.fingerprint
    publish_demo(registry, "two", folders)
    assert names() == ["dart", "e2e", "news"]
    registry.delete("default", "e2e")
    publish_demo(registry, "one", folders)
    assert names() == ["dart", "news"]


def test_a_demo_is_not_published_into_somebodys_registry(registry: Counting, tmp_path: Path) -> None:
    path = tmp_path / "prefixes" / "e2e.safetensors"
    path.parent.mkdir()
    path.write_bytes(write_prefix(make_prefix(SPEC)))
    registry.publish("default", "own", write_prefix(make_prefix(SPEC, seed=1)), record={})
    publish_demo(registry, "demo", {"demo": tmp_path})
    assert [task.name for task in registry.tasks()] == ["own"]
