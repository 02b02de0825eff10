"""A step that does not return: the server says so, takes nothing new, goes on if it returns, and ends if told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.backbone import Backbone
from prefixes.errors import NotReady
from server.app import Applications
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.inflow import Inflow
from server.engine.step_watch import StepWatch
from server.engine.types import Event, Failed, Finished, Usage
from server.lifecycle import _Server, bind
from server.web.listening import configured
from tests.support.apps import Served, with_apps
from tests.support.engine import Library, make_engine, tiny_backbone

PATIENCE = 60  # seconds until a test that hangs says so


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Hang:
    """Makes the engine's next call of the decoder wait for ``released``."""

    def __init__(self, engine: Engine) -> None:
        self.entered, self.released, self._decoder = threading.Event(), threading.Event(), engine._runner.decoder
        engine._runner.decoder = self._call  # type: ignore[method-assign]

    def _call(self, rows: Any) -> Any:
        self.entered.set()
        assert self.released.wait(PATIENCE)
        return self._decoder(rows)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_step_counts_as_hung_beyond_its_limit_and_no_more_when_it_has_returned() -> None:
    clock = Clock()
    watch = StepWatch(60.0, clock)
    clock.now += 1e6
    assert (watch.running_s, watch.busy, watch.hung) == (0.0, False, False), "between two steps"
    with watch:
        clock.now += 60
        assert (watch.running_s, watch.busy, watch.hung) == (60.0, True, False)
        watch.check()
        clock.now += 1
        assert watch.hung
        with pytest.raises(NotReady, match="the engine's step has run for 61 s, expected at most 60 s"):
            watch.check()
    assert (watch.running_s, watch.busy, watch.hung) == (0.0, False, False)
    with watch:
        assert watch.running_s == 0.0, "each step has its own time"
        watch.check()


def test_a_step_that_raises_is_not_under_way_any_more() -> None:
    watch = StepWatch(60.0, Clock())
    with pytest.raises(MemoryError), watch:
        raise MemoryError
    assert not watch.busy


def test_a_hung_kernel_is_told_nothing_new_is_taken_and_all_goes_on_when_it_returns(backbone: Backbone) -> None:
    async def scenario() -> None:
        library, clock = Library(backbone), Clock()
        engine = make_engine(backbone, library)
        hang = Hang(engine)
        served = AsyncEngine.start(engine, Inflow(100), StepWatch(60.0, clock))
        stream = served.submit(library.request("r", 0, [1], max_new_tokens=3, min_new_tokens=3))
        await until(hang.entered.is_set)
        served.check_alive()
        clock.now += 75
        assert served.step_running_s == 75
        with pytest.raises(NotReady, match="has run for 75 s"):
            served.check_alive()
        with pytest.raises(NotReady, match="has run for 75 s"):
            served.submit(library.request("more", 0, [2]))
        hang.released.set()
        assert len((await stream.result()).outputs[0].token_ids) == 3
        await until(lambda: served.step_running_s == 0)
        served.check_alive()
        await served.submit(library.request("more", 0, [2], max_new_tokens=1)).result()
        await served.close()
        engine.check_integrity()

    asyncio.run(scenario())


def test_a_drain_gives_up_on_a_hung_step_and_close_leaves_it_behind(backbone: Backbone) -> None:
    async def scenario() -> None:
        library, clock = Library(backbone), Clock()
        engine = make_engine(backbone, library)
        hang = Hang(engine)
        served = AsyncEngine.start(engine, Inflow(100), StepWatch(60.0, clock))
        streams = [served.submit(library.request(f"r{i}", 0, [i], max_new_tokens=3)) for i in range(3)]
        await until(hang.entered.is_set)
        clock.now += 61
        assert not await served.drain(timeout_s=3600)
        await served.close(patience_s=0.01)
        for stream in streams:
            events: list[Event] = [event async for event in stream]
            assert [type(event) for event in events] == [Failed]
        assert not served.healthy
        await served.close()  # the lifespan closes it once more: at once
        hang.released.set()
        await until(lambda: not served._thread.is_alive())

    asyncio.run(scenario())


def test_a_drain_waits_for_a_step_whose_clients_have_gone(backbone: Backbone) -> None:
    """It returned at once when no stream was open: a hung process then exited with 0."""

    async def scenario() -> None:
        library, clock = Library(backbone), Clock()
        engine = make_engine(backbone, library)
        hang = Hang(engine)
        served = AsyncEngine.start(engine, Inflow(100), StepWatch(60.0, clock))
        served.submit(library.request("r", 0, [1], max_new_tokens=3))
        await until(hang.entered.is_set)
        served._streams.clear()
        draining = asyncio.create_task(served.drain())
        await asyncio.sleep(0.05)
        assert not draining.done()
        clock.now += 61
        assert not await draining
        hang.released.set()
        await served.close()

    asyncio.run(scenario())


def engine_of(apps: Applications) -> AsyncEngine:
    engine: AsyncEngine = apps.public.state.runtime.engine
    return engine


def test_both_ports_say_that_a_step_hangs_and_new_requests_are_refused(tmp_path: Path) -> None:
    body = {"task": "e2e", "input": "x", "parameters": {"max_new_tokens": 2}}

    async def test(served: Served) -> None:
        engine, clock, hang = engine_of(served.apps), Clock(), Hang(served.assembled.engine)
        engine._watch = StepWatch(60.0, clock)
        first = asyncio.create_task(served.public.post("/generate", json=body))
        await until(hang.entered.is_set)
        clock.now += 90
        for client in (served.public, served.admin):
            for path in ("/ready", "/health"):
                answer = await client.get(path)
                assert answer.status_code == 503 and "retry-after" in answer.headers
                assert answer.json()["error"]["code"] == "not_ready"
                assert "the engine's step has run for 90 s" in answer.json()["error"]["message"]
        for path, sent in (
            ("/generate", body),
            ("/generate/batch", {"items": [body]}),
            ("/v1/completions", {"model": "e2e", "prompt": "x"}),
        ):
            answer = await served.public.post(path, json=sent)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready"), path
        assert "prefixd_step_running_seconds 90.0" in (await served.admin.get("/metrics")).text
        hang.released.set()
        assert (await first).status_code == 200
        await until(lambda: engine.step_running_s == 0)
        for client in (served.public, served.admin):
            assert (await client.get("/ready")).status_code == (await client.get("/health")).status_code == 200
        assert "prefixd_step_running_seconds 0.0" in (await served.admin.get("/metrics")).text
        assert (await served.public.post("/generate", json=body)).status_code == 200

    with_apps(tmp_path, test)


def test_a_signal_ends_a_server_whose_step_hangs_with_exit_code_one(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        engine, clock, hang = engine_of(served.apps), Clock(), Hang(served.assembled.engine)
        engine._watch = StepWatch(60.0, clock)
        request = asyncio.create_task(served.public.post("/generate", json={"input": "x"}))
        await until(hang.entered.is_set)
        clock.now += 61
        server = of(served)
        draining = asyncio.create_task(server._drain())
        await until(lambda: server._exit_code == 1)
        hang.released.set()
        await draining
        assert server.should_exit
        await request

    with_apps(tmp_path, test, port=0, admin_port=0)


def test_when_the_engines_thread_dies_requests_end_with_what_they_took_and_those_it_never_saw_with_nothing(
    backbone: Backbone,
) -> None:
    async def scenario() -> None:
        library, ends = Library(backbone, [0]), dict[str, Finished | Failed]()
        engine = make_engine(backbone, library)
        step, steps, stuck, go = engine.step, iter(range(3)), threading.Event(), threading.Event()

        def die_after_three() -> list[Event]:
            if next(steps, None) is None:
                stuck.set()
                assert go.wait(PATIENCE)
                raise SystemExit
            return step()

        engine.step = die_after_three  # type: ignore[method-assign]
        served = AsyncEngine.start(engine, Inflow(100), on_end=lambda asked, end: ends.update({asked.request_id: end}))
        served.submit(library.request("runs", 0, [1, 2], max_new_tokens=9, min_new_tokens=9))
        await until(stuck.is_set)
        served.submit(library.request("unseen", 0, [3]))
        go.set()
        await until(lambda: len(ends) == 2)
        failures = {name: end.usage for name, end in ends.items() if isinstance(end, Failed)}
        assert failures == {"runs": Usage(2, 0, 3), "unseen": None}
        await served.close()

    asyncio.run(scenario())


def test_a_signal_ends_a_server_whose_engine_has_died_with_exit_code_one(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        def die() -> list[Event]:
            raise SystemExit

        served.assembled.engine.step = die  # type: ignore[method-assign]
        assert (await served.public.post("/generate", json={"input": "x"})).status_code == 500
        server = of(served)
        await server._drain()
        assert server.should_exit and server._exit_code == 1

    with_apps(tmp_path, test, port=0, admin_port=0)


def of(served: Served) -> _Server:
    settings = served.assembled.settings
    with bind(settings) as sockets:
        pass
    return _Server(configured(served.apps.public, settings, lifespan=True), served.apps, sockets, settings)
