"""Faults beside a step's rows: in an abort, in adding, in a report, and those that come back. Nobody else is harmed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from prefixes.backbone import Backbone
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.inflow import Inflow
from server.engine.row import Group
from server.engine.scheduling.row_blocks import Beginning, RowBlocks
from server.engine.types import Failed, Finished, GenerationRequest
from tests.support.engine import Counts, Library, make_engine, run, tiny_backbone
from tests.support.step_faults import Moment, assert_at_rest, fault, serve

BLOCKS = "server.engine.memory.blocks:BlockLedger"
ENTRANCE = "server.engine.scheduling.entrance:Entrance"
SCHEDULER = "server.engine.scheduling.scheduler:Scheduler"
STORE = "server.engine.prefixes.store:PrefixStore"
QUEUES = "server.engine.scheduling.waiting:WaitingGroups"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)


@pytest.fixture(scope="module")
def library(backbone: Backbone) -> Library:
    return Library(backbone)


def requests(library: Library, count: int = 4) -> list[GenerationRequest]:
    return [
        library.request(f"r{index}", index % 4, range(2 * index + 3), max_new_tokens=9, min_new_tokens=9)
        for index in range(count)
    ]


def loaded(backbone: Backbone, library: Library, **config: Any) -> Engine:
    """An engine with all requests waiting."""
    engine = make_engine(backbone, library, **{"block_size": 4, **config})
    for request in requests(library):
        engine.add(request)
    return engine


def tokens(ends: dict[str, Finished | Failed]) -> dict[str, list[tuple[int, ...]]]:
    """Of those that finished."""
    return {
        name: [output.token_ids for output in end.outputs] for name, end in ends.items() if isinstance(end, Finished)
    }


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("waiting", [False, True], ids=["running", "waiting"])
@pytest.mark.parametrize(
    "call",
    [
        f"{SCHEDULER}.update", f"{SCHEDULER}._end", f"{STORE}._file", f"{STORE}._drop_if_unused",
        "server.engine.postprocess:Postprocess.abort", "server.engine.reporter:Reporter.events",
    ],
)  # fmt: skip
def test_a_fault_in_an_abort_ends_that_request_alone(
    backbone: Backbone, library: Library, call: str, waiting: bool, moment: Moment
) -> None:
    alone = tokens(serve(loaded(backbone, library)))
    engine = loaded(backbone, library, max_rows=3)
    run_until_running(engine, 3)
    name = "r3" if waiting else "r1"
    with fault(call, 1, moment):
        [end] = [event for event in engine.abort(name) if isinstance(event, Finished | Failed)]
    assert end.request_id == name
    assert engine.abort(name) == []
    del alone[name]
    assert tokens(serve(engine)) == alone
    assert_at_rest(engine)


def run_until_running(engine: Engine, count: int) -> None:
    for _ in range(200):
        engine.step()
        if len(engine._scheduler.running) == count:
            return
    raise AssertionError("they do not run")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "call", [f"{SCHEDULER}.add", f"{ENTRANCE}.wait", f"{QUEUES}.add", f"{QUEUES}._insert", f"{STORE}.want"]
)
def test_a_request_that_cannot_be_added_leaves_nothing_behind(
    backbone: Backbone, library: Library, call: str, moment: Moment
) -> None:
    alone = tokens(serve(loaded(backbone, library)))
    engine = loaded(backbone, library)
    engine.step()
    late = library.request("late", 3, [1], max_new_tokens=2)
    with fault(call, 1, moment), pytest.raises(MemoryError):
        engine.add(late)
    assert tokens(serve(engine)) == alone
    assert_at_rest(engine)
    assert isinstance(run(engine, [late])["late"], Finished), "its id is free again"


class Broken(Counts):
    """Takes no report."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return self._raise
        return super().__getattribute__(name)

    def _raise(self, *arguments: Any) -> None:
        raise MemoryError


def test_a_report_that_is_not_taken_harms_no_request(backbone: Backbone, library: Library) -> None:
    alone = tokens(serve(loaded(backbone, library)))
    broken = loaded(backbone, library, observer=Broken())
    assert tokens(serve(broken)) == alone
    assert_at_rest(broken)


def test_a_request_whose_admission_always_fails_fails_alone(
    backbone: Backbone, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, engine, real = tokens(serve(loaded(backbone, library))), loaded(backbone, library), RowBlocks.find

    def find(blocks: RowBlocks, group: Group) -> Beginning:
        if group.request.request_id == "r2":
            raise RecursionError
        return real(blocks, group)

    monkeypatch.setattr(RowBlocks, "find", find)
    ends = serve(engine)
    assert isinstance(ends["r2"], Failed)
    del alone["r2"]
    assert tokens(ends) == alone
    assert_at_rest(engine)


@pytest.mark.parametrize("call", [f"{SCHEDULER}.schedule", f"{ENTRANCE}.turns", f"{ENTRANCE}.take_in_loads"])
def test_a_fault_that_comes_back_each_time_ends_all_requests_and_not_the_engine(
    backbone: Backbone, library: Library, call: str
) -> None:
    alone, engine = tokens(serve(loaded(backbone, library))), loaded(backbone, library)
    with fault(call, 1, ever=True):
        ends = serve(engine)
    assert [type(end) for end in ends.values()] == [Failed] * 4
    assert_at_rest(engine)
    assert tokens(run(engine, requests(library))) == alone


def test_one_fault_while_all_wait_ends_nobody(backbone: Backbone, library: Library) -> None:
    alone, engine = tokens(serve(loaded(backbone, library))), loaded(backbone, library)
    with fault(f"{STORE}.settle", 1):
        assert tokens(serve(engine)) == alone


def test_the_engines_thread_outlives_memory_that_runs_out(backbone: Backbone, library: Library) -> None:
    async def scenario() -> None:
        engine = make_engine(backbone, library, block_size=4)
        served = AsyncEngine.start(engine, Inflow(100))
        for call in (f"{SCHEDULER}._candidates", f"{SCHEDULER}.runnable", f"{BLOCKS}.release"):
            with fault(call, 3) as calls:
                streams = [served.submit(request) for request in requests(library)]
                for stream in streams:
                    events = [event async for event in stream]
                    assert [isinstance(event, Finished | Failed) for event in events].count(True) == 1
                assert calls[0] >= 3, "the fault came"
            assert served.healthy
            for request in requests(library):
                await served.submit(request).result()
        await served.close()
        assert_at_rest(engine)

    asyncio.run(asyncio.wait_for(scenario(), 60))
