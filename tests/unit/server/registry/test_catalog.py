"""The catalog over a real disk registry: freshness, sharing of reads, verified loads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import server.registry.catalog
import server.registry.outages
from prefixes.artifact import write_prefix
from prefixes.errors import EngineFailure, IncompatiblePrefix, RegistryUnavailable, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import Resolved
from prefixes.spec import TaskRef
from server.assembly import publish_demo
from server.engine.types import PrefixKey
from server.registry.catalog import Catalog
from server.registry.link import RegistryLink
from server.tiers.tiers import PrefixTiers
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
        self.subscription: Any = None

    def subscribe(self, on_change: Callable[[str, str], None]) -> Any:
        self.on_change = on_change
        return self.subscription

    def check(self) -> None:
        if self.broken:
            raise RegistryUnavailable("down")
        self._registry.check()

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


def with_catalog(
    registry: Any, test: Callable[[Catalog], Awaitable[None]], ttl: float = 0.5, max_stale: float = 300.0
) -> None:
    async def run() -> None:
        link = RegistryLink(registry)
        tiers = PrefixTiers(lambda tenant, version: link.call("fetch", registry.fetch, tenant, version), ())
        catalog = Catalog(link, SPEC, tiers, alias_ttl_s=ttl, max_stale_s=max_stale)
        loop = asyncio.get_running_loop()

        def on_change(tenant: str, name: str) -> None:
            loop.call_soon_threadsafe(catalog.changed, tenant, name)

        link.start(on_change)
        try:
            await test(catalog)
        finally:
            link.close()

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


def test_an_outage_is_not_remembered(registry: Counting) -> None:
    async def test(catalog: Catalog) -> None:
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


class Announcing:
    """A subscription that a test connects and breaks."""

    def __init__(self) -> None:
        self.generation, self.heard_at, self.connected = 1, time.monotonic(), True

    def live(self) -> bool:
        return self.connected

    def close(self) -> None:
        pass


def test_a_slow_start_is_no_outage(registry: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link is made before kernels are compiled; for longer than a probe may be silent, nobody asks."""
    link = RegistryLink(registry)
    monkeypatch.setattr(link, "_answered_at", time.monotonic() - 60)
    link.start(lambda tenant, name: None)
    try:
        link.require_up()
    finally:
        link.close()


def test_a_prefix_that_no_tier_holds_is_refused_before_it_is_waited_for(registry: Counting) -> None:
    key = PrefixKey("default", publish(registry))

    async def test(catalog: Catalog) -> None:
        catalog.require_loadable(key, lambda: False)
        registry.broken = True
        await until(lambda: not catalog._link.up)
        with pytest.raises(RegistryUnavailable, match="down"):
            catalog.require_loadable(key, lambda: False)
        catalog.require_loadable(key, lambda: True)

    with_catalog(registry, test)


async def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_what_is_announced_need_not_be_asked_for(registry: Counting) -> None:
    first, second = publish(registry, 0), publish(registry, 1)
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        for _ in range(3):
            assert (await catalog.resolve(E2E)).version == second
        assert registry.resolved == 1  # although nothing is believed for longer than no time at all
        registry.promote("default", "e2e", first)
        registry.on_change("default", "e2e")
        await until(lambda: registry.resolved == 2)
        await until(lambda: not catalog._reads)
        assert (await catalog.resolve(E2E)).version == first
        assert registry.resolved == 2  # it was read before somebody asked

    with_catalog(registry, test, ttl=0)


def test_a_subscription_that_broke_is_not_believed(registry: Counting) -> None:
    first, second = publish(registry, 0), publish(registry, 1)
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        assert (await catalog.resolve(E2E)).version == second
        registry.subscription.connected = False
        registry.promote("default", "e2e", first)
        assert (await catalog.resolve(E2E)).version == first
        registry.promote("default", "e2e", second)
        registry.subscription.connected = True
        registry.subscription.generation += 1  # it is back, and that promote was never announced
        assert (await catalog.resolve(E2E)).version == second

    with_catalog(registry, test, ttl=0)


def test_a_read_that_a_change_has_overtaken_is_not_remembered(registry: Counting) -> None:
    first, second = publish(registry, 0), publish(registry, 1)

    async def test(catalog: Catalog) -> None:
        registry.go.clear()
        waiting = asyncio.create_task(catalog.resolve(E2E))
        await until(lambda: registry.resolved == 1)
        catalog.forget("default", "e2e")
        registry.go.set()
        assert (await waiting).version == second
        registry.promote("default", "e2e", first)
        assert (await catalog.resolve(E2E)).version == first

    with_catalog(registry, test, ttl=60)


def test_while_the_registry_is_away_what_is_known_is_served_and_the_rest_is_not_waited_for(registry: Counting) -> None:
    version = publish(registry, 0)

    async def test(catalog: Catalog) -> None:
        await catalog.resolve(E2E)
        registry.broken = True
        assert (await catalog.resolve(E2E)).version == version
        await until(lambda: not catalog._link.up)
        asked = registry.resolved
        assert (await catalog.resolve(E2E)).version == version
        with pytest.raises(RegistryUnavailable, match="down"):
            await catalog.resolve(TaskRef("default", "other"))
        with pytest.raises(RegistryUnavailable, match="down"):
            await catalog.call(registry.promote, "default", "e2e", version)
        assert registry.resolved == asked  # nobody was sent to ask in vain
        await catalog.check()  # traffic may still come
        registry.broken = False
        await until(lambda: catalog._link.up)
        assert (await catalog.resolve(E2E)).version == version
        assert registry.resolved == asked + 1

    with_catalog(registry, test, ttl=0)


def test_what_is_known_is_served_no_longer_than_max_stale(registry: Counting) -> None:
    publish(registry, 0)

    async def test(catalog: Catalog) -> None:
        await catalog.resolve(E2E)
        registry.broken = True
        await until(lambda: not catalog._link.up and catalog._link.age_s > 0.3)
        with pytest.raises(RegistryUnavailable):
            await catalog.resolve(E2E)
        with pytest.raises(RegistryUnavailable):
            await catalog.check()

    with_catalog(registry, test, ttl=0, max_stale=0.3)


@pytest.mark.parametrize("announced_before", [False, True])
def test_what_nobody_asked_for_lately_is_known_at_the_moment_of_an_outage(
    registry: Counting, announced_before: bool
) -> None:
    """Polled references were given up at once, and those of every connection to the registry but the last."""
    version = publish(registry, 0)
    if announced_before:
        registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        keeping = asyncio.create_task(catalog.keep_known())
        await catalog.resolve(E2E)
        asked = registry.resolved
        if announced_before:
            registry.subscription.generation += 1  # connected anew
            registry.subscription.connected = False
        await asyncio.sleep(2.5)  # longer than max_stale
        assert asked + 1 < registry.resolved < asked + 25  # now and then, and no more often than it must
        registry.broken = True
        await until(lambda: not catalog._link.up)
        assert (await catalog.resolve(E2E)).version == version
        keeping.cancel()

    with_catalog(registry, test, ttl=0, max_stale=2.0)


def test_what_is_read_again_in_between_stays_in_the_order_of_asking(
    registry: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.registry.catalog, "MAX_KNOWN", 2)
    refs = [TaskRef("default", name) for name in ("a", "b", "c")]
    for ref in refs:
        publish(registry, name=ref.name)

    async def test(catalog: Catalog) -> None:
        for ref in (*refs[:2], refs[0]):
            await catalog.resolve(ref)
        keeping = asyncio.create_task(catalog.keep_known())
        asked = registry.resolved
        await until(lambda: registry.resolved >= asked + 2)
        keeping.cancel()
        await asyncio.gather(*catalog._reads.values())
        await catalog.resolve(refs[2])
        assert list(catalog._known) == [refs[0], refs[2]]

    with_catalog(registry, test, ttl=60, max_stale=1.0)


def test_lists_and_changes_that_take_long_keep_nobody_from_finding_a_task(registry: Counting) -> None:
    version, release = publish(registry, 0), threading.Event()

    async def test(catalog: Catalog) -> None:
        long = [asyncio.create_task(call(release.wait, 30)) for call in (catalog.call, catalog.call_alone) * 20]
        await asyncio.sleep(0.1)
        try:
            assert (await catalog.resolve(E2E)).version == version
        finally:
            release.set()
            await asyncio.gather(*long)

    with_catalog(registry, test)


@pytest.mark.parametrize("tenants", [1, 40])
def test_tenants_whose_data_does_not_answer_are_asked_for_few_at_a_time_and_hold_up_nobody(
    registry: Counting, tenants: int
) -> None:
    version, asked = publish(registry, 0), list[str]()

    def resolve(ref: TaskRef) -> Resolved:
        asked.append(ref.tenant)
        if ref.tenant.startswith("lost"):
            time.sleep(server.registry.outages.SLOW_S + 0.1)
            raise RegistryUnavailable("of a node that is away")
        resolved: Resolved = registry._registry.resolve(ref)
        return resolved

    registry.resolve = resolve  # type: ignore[method-assign]

    async def test(catalog: Catalog) -> None:
        async def ask(number: int) -> None:
            while not stop.is_set():
                with contextlib.suppress(RegistryUnavailable):
                    await catalog.resolve(TaskRef(f"lost-{number % tenants}", f"task-{number}"))
                await asyncio.sleep(0.01)

        stop = asyncio.Event()
        asking = [asyncio.create_task(ask(number)) for number in range(40)]
        await until(lambda: len(catalog._outages._outages) == tenants)
        asked.clear()
        began = time.monotonic()
        for number in range(20):
            assert (await catalog.resolve(E2E)).version == version
            with pytest.raises(TaskNotFound):
                await catalog.resolve(TaskRef("default", f"none-{number}"))
            await asyncio.sleep(0.1)
        tries = 1 + (time.monotonic() - began) / (server.registry.outages.SLOW_S + 0.1)
        lost = sum(tenant.startswith("lost") for tenant in asked)
        assert 1 <= lost <= server.registry.catalog.TRY_THREADS * tries  # of some thousands who wanted to
        stop.set()
        await asyncio.gather(*asking)

    with_catalog(registry, test, ttl=0)


def test_a_task_that_cannot_be_read_is_no_outage_of_its_tenants_others(registry: Counting) -> None:
    version = publish(registry, 0)

    def resolve(ref: TaskRef) -> Resolved:
        if ref.name == "damaged":
            raise RegistryUnavailable("a damaged record")
        resolved: Resolved = registry._registry.resolve(ref)
        return resolved

    registry.resolve = resolve  # type: ignore[method-assign]

    async def test(catalog: Catalog) -> None:
        for _ in range(3):
            with pytest.raises(RegistryUnavailable, match="damaged"):
                await catalog.resolve(TaskRef("default", "damaged"))
            assert (await catalog.resolve(E2E)).version == version

    with_catalog(registry, test, ttl=0)


def test_what_was_announced_up_to_the_outage_counts_as_known_until_then(registry: Counting) -> None:
    """Without it, a task that nobody had asked for lately would be given up as soon as the registry is away."""
    publish(registry, 0)
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        await catalog.resolve(E2E)
        await asyncio.sleep(1.2)
        registry.subscription.heard_at = time.monotonic()
        registry.subscription.connected, registry.broken = False, True
        await catalog.resolve(E2E)

    with_catalog(registry, test, ttl=0, max_stale=1.0)


def test_a_registry_that_hangs_is_not_waited_for_without_end(
    registry: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, 0)
    monkeypatch.setattr(server.registry.catalog, "WAIT_S", 0.05)

    async def test(catalog: Catalog) -> None:
        await catalog.resolve(E2E)
        registry.go.clear()
        assert (await catalog.resolve(E2E)).version == version
        with pytest.raises(RegistryUnavailable, match="did not answer in time"):
            await catalog.resolve(TaskRef("default", "other"))
        registry.go.set()

    with_catalog(registry, test, ttl=0)


def test_a_task_that_was_deleted_is_not_known_any_more(registry: Counting) -> None:
    publish(registry, 0)

    async def test(catalog: Catalog) -> None:
        await catalog.resolve(E2E)
        registry.delete("default", "e2e")
        with pytest.raises(TaskNotFound):
            await catalog.resolve(E2E)
        registry.broken = True
        with pytest.raises(RegistryUnavailable):
            await catalog.resolve(E2E)

    with_catalog(registry, test, ttl=0)


def test_the_memory_of_references_is_bounded(registry: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.registry.catalog, "MAX_KNOWN", 3)
    for seed in range(6):
        publish(registry, seed, name=f"task-{seed}")

    async def test(catalog: Catalog) -> None:
        for seed in (0, 1, 2, 0, 3, 0, 4, 5):
            await catalog.resolve(TaskRef("default", f"task-{seed}"))
        assert [ref.name for ref in catalog._known] == ["task-0", "task-4", "task-5"]
        assert set(catalog._known._by_task) == {("default", f"task-{seed}") for seed in (0, 4, 5)}

    with_catalog(registry, test, ttl=60)


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


def test_without_prefixes_of_its_own_a_backbone_begins_with_no_task_and_says_what_to_do(
    registry: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for task in (None, "own"):
        if task is not None:
            registry.publish("default", task, write_prefix(make_prefix(SPEC)), record={})
        caplog.clear()
        publish_demo(registry, "smollm2", {"smollm2": tmp_path / "smollm2"})
        assert [found.name for found in registry.tasks()] == ([] if task is None else [task])
        assert ("prefixd train" in caplog.text) is (task is None)


def test_a_change_that_cannot_be_read_any_more_leaves_what_was_known(registry: Counting) -> None:
    """What was announced was forgotten at once: with a registry that went away just then, served tasks were refused."""
    first, second = publish(registry, 0), publish(registry, 1)
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        assert (await catalog.resolve(E2E)).version == second
        registry.promote("default", "e2e", first)
        registry.broken = True
        registry.on_change("default", "e2e")
        await until(lambda: registry.resolved == 2 or not catalog._link.up)
        assert (await catalog.resolve(E2E)).version == second
        registry.broken = False
        await until(lambda: catalog._link.up)
        assert (await catalog.resolve(E2E)).version == first

    with_catalog(registry, test, ttl=60)


def test_a_publish_that_was_refused_makes_nothing_known_for_longer(registry: Counting) -> None:
    publish(registry, 0)
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        await catalog.resolve(E2E)
        registry.broken = True
        began = time.monotonic()
        while time.monotonic() < began + 1.5:
            catalog.changed("default", "e2e")
            registry.subscription.heard_at = time.monotonic()  # an emptied Redis still says that nothing happens
            await asyncio.sleep(0.05)
        with pytest.raises(RegistryUnavailable):
            await catalog.resolve(E2E)

    with_catalog(registry, test, ttl=0, max_stale=0.8)


def test_the_announcements_of_an_emptied_registry_count_for_nothing(registry: Counting) -> None:
    """Its connection lives on, and no change is announced on it: known tasks were served for ever."""
    version = publish(registry, 0)
    registry.subscription = Announcing()

    async def test(catalog: Catalog) -> None:
        await catalog.resolve(E2E)
        registry.broken = True
        await until(lambda: not catalog._link.up)
        registry.subscription.heard_at = time.monotonic()
        assert (await catalog.resolve(E2E)).version == version
        assert not catalog._link.state().subscribed
        await asyncio.sleep(1.3)
        registry.subscription.heard_at = time.monotonic()
        with pytest.raises(RegistryUnavailable):
            await catalog.resolve(E2E)

    with_catalog(registry, test, ttl=0, max_stale=1.2)


def test_what_this_process_has_changed_is_read_again_before_somebody_asks(registry: Counting) -> None:
    """Else a task that nobody asks for after its promote would be unknown when the registry goes away."""
    first, second = publish(registry, 0), publish(registry, 1)

    async def test(catalog: Catalog) -> None:
        assert (await catalog.resolve(E2E)).version == second
        registry.promote("default", "e2e", first)
        catalog.forget("default", "e2e")
        await until(lambda: registry.resolved == 2 and not catalog._reads)
        registry.broken = True
        await until(lambda: not catalog._link.up)
        assert (await catalog.resolve(E2E)).version == first

    with_catalog(registry, test, ttl=0)
