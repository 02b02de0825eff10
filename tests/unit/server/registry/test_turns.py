"""Turns are shared between tenants: who waits comes after one of each other, and none is lost or held."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from prefixes.errors import RegistryUnavailable
from server.registry.turns import Turns


class Scene:
    """Takes turns and ends them by name; ``begun`` lists the tenants whose turn began, in order."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.begun = turns, list[str]()
        self._ends: list[tuple[str, asyncio.Event]] = []

    def ask(self, tenant: str) -> asyncio.Task[None]:
        async def take() -> None:
            async with self.turns.turn(tenant):
                self.begun.append(tenant)
                end = asyncio.Event()
                self._ends.append((tenant, end))
                await end.wait()

        return asyncio.create_task(take())

    async def end(self, tenant: str) -> None:
        found = next(item for item in self._ends if item[0] == tenant)
        self._ends.remove(found)
        found[1].set()
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def played(test: Callable[[Scene], Awaitable[None]], most: int = 3, each: int = 2, waiting: int = 100) -> None:
    async def run() -> None:
        scene = Scene(Turns(most, each, waiting))
        await test(scene)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await settled()
        assert scene.turns._free == most
        assert not scene.turns._waiting
        assert not scene.turns._running

    asyncio.run(run())


def test_no_tenant_has_all_turns() -> None:
    async def test(scene: Scene) -> None:
        for _ in range(10):
            scene.ask("flood")
        await settled()
        assert scene.begun == ["flood", "flood"]
        scene.ask("other")
        await settled()
        assert scene.begun == ["flood", "flood", "other"]

    played(test)


def test_tenants_that_wait_take_turns() -> None:
    async def test(scene: Scene) -> None:
        for tenant in ("a", "a", "a", "a", "b", "b", "c", "c"):
            scene.ask(tenant)
        await settled()
        assert scene.begun == ["a"]
        for _ in range(7):
            await scene.end(scene.begun[-1])
        assert scene.begun == ["a", "a", "b", "c", "a", "b", "c", "a"]

    played(test, most=1, each=1)


def test_one_who_leaves_gives_the_turn_to_the_next() -> None:
    async def test(scene: Scene) -> None:
        scene.ask("a")
        await settled()
        left = [scene.ask("b"), scene.ask("b")]
        scene.ask("c")
        await settled()
        left[0].cancel()
        await settled()
        await scene.end("a")
        assert scene.begun == ["a", "b"]
        left[1].cancel()
        await settled()
        assert scene.begun == ["a", "b", "c"]

    played(test, most=1, each=1)


def test_a_turn_that_is_given_to_one_who_leaves_at_that_moment_is_not_lost() -> None:
    async def test(scene: Scene) -> None:
        scene.ask("a")
        await settled()
        leaves = scene.ask("b")
        scene.ask("c")
        await settled()
        scene._ends[0][1].set()
        while not any(future.done() for future in [*scene.turns._waiting.get("b", ())]) and scene.turns._running["a"]:
            await asyncio.sleep(0)
        leaves.cancel()
        await settled()
        assert scene.begun == ["a", "c"]

    played(test, most=1, each=1)


def test_of_one_tenant_so_many_wait_at_most() -> None:
    async def test(scene: Scene) -> None:
        asked = [scene.ask("flood") for _ in range(6)]
        await settled()
        with pytest.raises(RegistryUnavailable, match="expected at most 3 look-ups that wait, got one more"):
            await asked[-1]
        assert not asked[-2].done()
        scene.ask("other")
        await settled()
        assert scene.begun == ["flood", "flood", "other"]

    played(test, waiting=3)
