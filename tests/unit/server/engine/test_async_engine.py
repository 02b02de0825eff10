"""The engine's thread behind asyncio: every stream ends exactly once, whatever fails, and slow loads hold nobody up."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from prefixes.errors import EngineFailure, InputTooLong, InvalidArtifact, InvalidParameter, QueueFull, ShuttingDown
from prefixes.tenancy.limits import NO_LIMITS, Limits
from server.engine.async_engine import AsyncEngine, EventStream
from server.engine.config import no_limits
from server.engine.engine import Engine
from server.engine.inflow import Inflow
from server.engine.types import Event, Failed, Finished, FinishReason, GenerationRequest, PrefixKey, TokenEvent
from tests.support.engine import Counts, Library, make_engine, run, tiny_backbone

PATIENCE = 60  # seconds until a test that hangs says so


class SlowLibrary(Library):
    """Loads of held keys wait at a gate; broken ones fail."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.gate, self.held, self.broken = threading.Event(), set[PrefixKey](), set[PrefixKey]()

    def load(self, key: PrefixKey) -> Prefix:
        if key in self.held:
            assert self.gate.wait(PATIENCE)
        if key in self.broken:
            raise InvalidArtifact("broken")
        return super().load(key)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), torch.float64)


@pytest.fixture
def library(backbone: Backbone) -> SlowLibrary:
    return SlowLibrary(backbone)


def in_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


@asynccontextmanager
async def started(
    engine: Engine, max_waiting: int = 100, per_tenant: int | None = None,
    limits_of: Callable[[str, str | None], Limits] = no_limits,
) -> AsyncIterator[AsyncEngine]:
    """Running; afterwards closed, and nothing held."""
    served = AsyncEngine.start(engine, Inflow(max_waiting, per_tenant, limits_of))
    try:
        yield served
    finally:
        await served.close()
    assert not served._streams
    if not served._failed:
        engine.check_integrity()
        assert engine.requests == 0


async def drained(stream: EventStream) -> list[Event]:
    """All events; exactly the last is terminal."""
    events = [event async for event in stream]
    assert [isinstance(event, Finished | Failed) for event in events] == [False] * (len(events) - 1) + [True]
    assert {event.request_id for event in events} == {stream.request_id}
    return events


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_streams_give_what_the_engine_gives(backbone: Backbone, library: SlowLibrary) -> None:
    kinds: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1, "num_return_sequences": 2}]
    requests = [library.request(f"r{i}", i, range(3 * i + 1), max_new_tokens=8, **kinds[i % 3]) for i in range(6)]
    alone = run(make_engine(backbone, library), requests)

    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            streams = [served.submit(request) for request in requests]
            for stream, events in zip(streams, await asyncio.gather(*map(drained, streams)), strict=True):
                done, expected = events[-1], alone[stream.request_id]
                assert isinstance(done, Finished)
                assert isinstance(expected, Finished)
                assert [output.token_ids for output in done.outputs] == [o.token_ids for o in expected.outputs]
                for index, output in enumerate(done.outputs):
                    pieces = [e.text for e in events if isinstance(e, TokenEvent) and e.index == index]
                    assert "".join(pieces) == output.text or output.score is not None
                assert 0 <= done.timing.queue_ms <= done.timing.total_ms

    in_loop(scenario())


def test_a_stream_that_has_ended_stays_ended(backbone: Backbone, library: SlowLibrary) -> None:
    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            stream = served.submit(library.request("r", 0, [1], max_new_tokens=2))
            await drained(stream)
            assert [event async for event in stream] == []
            assert stream.take_ready() == []
            stream.abort()

    in_loop(scenario())


def test_events_that_are_here_can_be_taken_together(backbone: Backbone, library: SlowLibrary) -> None:
    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            stream = served.submit(library.request("r", 0, [1], max_new_tokens=20, min_new_tokens=20))
            await until(lambda: not served._streams)
            events = stream.take_ready()
            assert len(events) == 21
            assert isinstance(events[-1], Finished)
            assert stream.take_ready() == []

    in_loop(scenario())


def test_a_refused_request_leaves_nothing_behind(backbone: Backbone, library: SlowLibrary) -> None:
    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            with pytest.raises(InputTooLong):
                served.submit(library.request("r", 0, [1] * 400))
            assert not served._streams
            await served.submit(library.request("r", 0, [1], max_new_tokens=1)).result()

    in_loop(scenario())


def test_an_id_that_runs_cannot_be_used_again(backbone: Backbone, library: SlowLibrary) -> None:
    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            first = served.submit(library.request("r", 0, [1], max_new_tokens=50, min_new_tokens=50))
            with pytest.raises(EngineFailure, match="already in use"):
                served.submit(library.request("r", 0, [2]))
            assert isinstance((await drained(first))[-1], Finished)

    in_loop(scenario())


def test_a_full_queue_refuses_and_takes_again_when_it_has_emptied(backbone: Backbone, library: SlowLibrary) -> None:
    key = library.keys[1]
    assert key is not None
    library.held.add(key)

    async def scenario() -> None:
        async with started(make_engine(backbone, library), max_waiting=3) as served:
            streams = [served.submit(library.request(f"r{i}", 1, [1], max_new_tokens=2)) for i in range(3)]
            for _ in range(2):
                with pytest.raises(QueueFull, match="at most 3 waiting requests, there are 3") as caught:
                    served.submit(library.request("more", 0, [1]))
                assert caught.value.detail["retry_after_s"] == 1
                await until(lambda: served.stats().waiting == 3)  # the second time they are counted by the engine
            library.gate.set()
            for stream in streams:
                await stream.result()
            await served.submit(library.request("more", 0, [1], max_new_tokens=1)).result()

    in_loop(scenario())


def test_one_tenants_requests_do_not_fill_the_queue_for_another(backbone: Backbone, library: SlowLibrary) -> None:
    """A tenant could take all of the queue, and everybody else was refused."""
    key = library.keys[1]
    assert key is not None
    library.held.add(key)

    def of(caller: str, name: str) -> GenerationRequest:
        return replace(library.request(name, 1, [1], max_new_tokens=2), caller=caller)

    async def scenario() -> None:
        async with started(make_engine(backbone, library), max_waiting=5, per_tenant=3) as served:
            streams = [served.submit(of("flood", f"f{index}")) for index in range(3)]
            for _ in range(2):
                with pytest.raises(QueueFull, match=r"at most 3 .* of tenant 'flood' \(max_waiting_per") as caught:
                    served.submit(of("flood", "more"))
                assert caught.value.detail == {"expected": 3, "got": 3, "retry_after_s": 1}
                await until(lambda: served.stats().waiting == 3)  # the second time they are counted by the engine
            streams += [served.submit(of("quiet", f"q{index}")) for index in range(2)]
            with pytest.raises(QueueFull, match="at most 5 waiting requests, there are 5"):
                served.submit(of("third", "t"))
            library.gate.set()
            for stream in streams:
                await stream.result()
            await served.submit(of("flood", "more")).result()

    in_loop(scenario())


def test_a_tenants_and_a_keys_own_limits_of_waiting_requests_are_kept(
    backbone: Backbone, library: SlowLibrary
) -> None:
    held = library.keys[1]
    assert held is not None
    library.held.add(held)

    def limits_of(tenant: str, key: str | None) -> Limits:
        return {("t", None): Limits(requests_waiting=3), ("t", "small"): Limits(requests_waiting=2)}.get(
            (tenant, key), NO_LIMITS
        )

    def of(name: str, key: str | None, caller: str = "t") -> GenerationRequest:
        return replace(library.request(name, 1, [1], max_new_tokens=2), caller=caller, key=key)

    async def scenario() -> None:
        async with started(make_engine(backbone, library), limits_of=limits_of) as served:
            streams = [served.submit(of(f"s{index}", "small")) for index in range(2)]
            for _ in range(2):
                with pytest.raises(QueueFull, match=r"at most 2 .* of key 'small' \(its requests_waiting\)") as caught:
                    served.submit(of("more", "small"))
                assert caught.value.detail == {
                    "limit": "requests_waiting", "of": "key", "expected": 2, "got": 2, "retry_after_s": 1
                }  # fmt: skip
                await until(lambda: served.stats().waiting == 2)  # the second time they are counted by the engine
            streams.append(served.submit(of("other", "large")))
            for key in ("large", None):
                with pytest.raises(QueueFull, match=r"at most 3 .* of tenant 't' \(its requests_waiting\)"):
                    served.submit(of("more", key))
            streams.append(served.submit(of("another tenant's", "its own", "u")))
            library.gate.set()
            for stream in streams:
                await stream.result()
            await served.submit(of("more", "small")).result()

    in_loop(scenario())


def test_what_can_never_run_is_told_so_although_the_queue_is_full(backbone: Backbone, library: SlowLibrary) -> None:
    """It was told to come back later."""
    key = library.keys[1]
    assert key is not None
    library.held.add(key)

    async def scenario() -> None:
        async with started(make_engine(backbone, library, max_rows=2), max_waiting=1) as served:
            waits = served.submit(library.request("waits", 1, [1], max_new_tokens=1))
            with pytest.raises(InvalidParameter, match="at most 2 rows, got 3"):
                served.submit(library.request("wide", 0, [1], num_beams=3))
            library.gate.set()
            await waits.result()

    in_loop(scenario())


def test_the_queue_is_counted_right_after_many_submissions(backbone: Backbone, library: SlowLibrary) -> None:
    async def scenario() -> None:
        async with started(make_engine(backbone, library), max_waiting=40) as served:
            for round_ in range(5):
                await asyncio.gather(*(
                    served.submit(library.request(f"{round_} {i}", 0, [i], max_new_tokens=1)).result()
                    for i in range(40)
                ))
            assert len(served._inflow) == 0

    in_loop(scenario())


def test_abort_ends_the_stream_once_and_is_idempotent(backbone: Backbone, library: SlowLibrary) -> None:
    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            stream = served.submit(library.request("r", 0, [1], max_new_tokens=200, min_new_tokens=200))
            first = await anext(stream)
            assert isinstance(first, TokenEvent)
            for _ in range(3):
                stream.abort()
            events = await drained(stream)
            done = events[-1]
            assert isinstance(done, Finished)
            assert done.outputs[0].finish_reason is FinishReason.ABORT
            assert 1 <= len(done.outputs[0].token_ids) < 200

    in_loop(scenario())


def test_a_cancelled_wait_for_the_result_aborts_the_request(backbone: Backbone, library: SlowLibrary) -> None:
    async def scenario() -> None:
        engine = make_engine(backbone, library)
        async with started(engine) as served:
            stream = served.submit(library.request("r", 0, [1], max_new_tokens=300, min_new_tokens=300))
            waiting = asyncio.create_task(stream.result())
            await until(lambda: served.stats().running == 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: not served._streams)
            done = (await drained(stream))[-1]
            assert isinstance(done, Finished)
            assert done.outputs[0].finish_reason is FinishReason.ABORT

    in_loop(scenario())


def test_a_failed_load_is_raised_by_result_and_the_next_try_succeeds(backbone: Backbone, library: SlowLibrary) -> None:
    key = library.keys[1]
    assert key is not None
    library.broken.add(key)

    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            with pytest.raises(InvalidArtifact):
                await served.submit(library.request("r", 1, [1])).result()
            library.broken.clear()
            await served.submit(library.request("again", 1, [1], max_new_tokens=2)).result()
            assert key in served.residents()

    in_loop(scenario())


def test_a_slow_load_holds_up_nobody_who_runs(backbone: Backbone, library: SlowLibrary) -> None:
    """Steps are counted while the load waits: everybody else starts and ends within it."""
    key, counts = library.keys[1], Counts()
    assert key is not None
    library.held.add(key)

    async def scenario() -> None:
        async with started(make_engine(backbone, library, observer=counts)) as served:
            slow = served.submit(library.request("slow", 1, [1], max_new_tokens=2))
            others = [
                served.submit(library.request(f"r{i}", task, [i], max_new_tokens=30, min_new_tokens=30))
                for i, task in enumerate([0, 2, 3])
            ]
            await asyncio.gather(*(stream.result() for stream in others))
            assert len(counts.steps) >= 30
            assert served.stats().waiting == 1
            assert slow.take_ready() == []
            library.gate.set()
            await slow.result()

    in_loop(scenario())


def test_the_thread_sleeps_while_all_wait_for_a_load_and_wakes_with_it(
    backbone: Backbone, library: SlowLibrary
) -> None:
    key = library.keys[1]
    assert key is not None
    library.held.add(key)

    async def scenario() -> None:
        engine = make_engine(backbone, library)
        steps, step = [0], engine.step

        def counted() -> list[Event]:
            steps[0] += 1
            return step()

        engine.step = counted  # type: ignore[method-assign]
        async with started(engine) as served:
            stream = served.submit(library.request("r", 1, [1], max_new_tokens=3, min_new_tokens=3))
            await until(lambda: served.stats().waiting == 1)
            await asyncio.sleep(0.05)
            assert steps[0] == 0
            library.gate.set()
            await stream.result()
            assert steps[0] <= 4

    in_loop(scenario())


def test_drain_takes_nothing_new_and_waits_for_what_is_here(backbone: Backbone, library: SlowLibrary) -> None:
    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            stream = served.submit(library.request("r", 0, [1], max_new_tokens=60, min_new_tokens=60))
            assert not served.draining
            draining = asyncio.create_task(served.drain())
            await until(lambda: served.draining)
            with pytest.raises(ShuttingDown) as caught:
                served.submit(library.request("late", 0, [1]))
            assert caught.value.detail["retry_after_s"] > 0
            assert await draining
            done = (await drained(stream))[-1]
            assert isinstance(done, Finished)
            assert done.outputs[0].finish_reason is FinishReason.LENGTH

    in_loop(scenario())


def test_drain_gives_up_in_time_and_close_aborts_the_rest(backbone: Backbone, library: SlowLibrary) -> None:
    key = library.keys[1]
    assert key is not None
    library.held.add(key)

    async def scenario() -> None:
        async with started(make_engine(backbone, library)) as served:
            stream = served.submit(library.request("r", 1, [1]))
            assert not await served.drain(timeout_s=0.0)
            await served.close()
            done = (await drained(stream))[-1]
            assert isinstance(done, Finished)
            assert done.outputs[0].finish_reason is FinishReason.ABORT
            assert not served.healthy
            library.gate.set()

    in_loop(scenario())


def test_close_aborts_what_waits_loads_and_runs(backbone: Backbone, library: SlowLibrary) -> None:
    key = library.keys[1]
    assert key is not None
    library.held.add(key)

    async def scenario() -> None:
        engine = make_engine(backbone, library, max_rows=2)
        async with started(engine) as served:
            streams = [
                served.submit(library.request(f"r{i}", i % 2, [i], max_new_tokens=300, min_new_tokens=300))
                for i in range(8)
            ]
            await anext(streams[0])
            await served.close()
            for stream in streams:
                done = (await drained(stream))[-1]
                assert isinstance(done, Finished)
                assert done.outputs[0].finish_reason is FinishReason.ABORT
            library.gate.set()

    in_loop(scenario())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_thread_dies_all_streams_fail_and_nothing_more_is_taken(
    backbone: Backbone, library: SlowLibrary
) -> None:
    async def scenario() -> None:
        engine = make_engine(backbone, library, max_rows=1)
        async with started(engine) as served:
            streams = [served.submit(library.request(f"r{i}", 0, [1], max_new_tokens=300, min_new_tokens=300))
                       for i in range(3)]
            await anext(streams[0])

            def broken() -> list[Event]:
                raise MemoryError

            engine.step = broken  # type: ignore[method-assign]
            for stream in streams:
                failed = (await drained(stream))[-1]
                assert isinstance(failed, Failed)
                assert failed.error.code == "engine_failure"
            assert not served.healthy
            with pytest.raises(EngineFailure, match="has stopped"):
                served.submit(library.request("late", 0, [1]))
            assert not await served.drain(), "requests were lost"

    in_loop(scenario())


def test_a_request_submitted_while_the_thread_dies_fails_too(backbone: Backbone, library: SlowLibrary) -> None:
    """The thread told the streams that it saw; one that came between that and the loop's knowing waited for ever."""
    async def scenario() -> None:
        engine = make_engine(backbone, library)
        async with started(engine) as served:
            reached, go_on = threading.Event(), threading.Event()

            def broken() -> list[Event]:
                reached.set()
                assert go_on.wait(PATIENCE)
                raise MemoryError

            engine.step = broken  # type: ignore[method-assign]
            first = served.submit(library.request("first", 0, [1]))
            await asyncio.to_thread(reached.wait)
            go_on.set()
            served._thread.join()  # the loop stands still: the thread is gone, its last words are not yet heard
            served._thread.is_alive = lambda: True  # type: ignore[method-assign]
            served._failed = False
            late = served.submit(library.request("late", 0, [1]))  # healthy as far as the loop could know
            served._failed = True
            del served._thread.is_alive
            for stream in (first, late):
                assert isinstance((await drained(stream))[-1], Failed)

    in_loop(scenario())


def test_a_request_that_cannot_be_added_fails_alone(backbone: Backbone, library: SlowLibrary) -> None:
    """An exception on the way in stopped the thread, and with it everybody."""
    async def scenario() -> None:
        engine = make_engine(backbone, library)
        add = engine.add

        def picky(request: Any, submitted_at: float | None = None) -> None:
            if request.request_id == "odd":
                raise KeyError("a secret that no user may see")
            add(request, submitted_at)

        engine.add = picky  # type: ignore[method-assign]
        async with started(engine) as served:
            odd = served.submit(library.request("odd", 0, [1]))
            good = served.submit(library.request("good", 0, [1], max_new_tokens=2))
            failed = (await drained(odd))[-1]
            assert isinstance(failed, Failed)
            assert "secret" not in failed.error.message
            await good.result()
            assert served.healthy

    in_loop(scenario())


def test_a_pin_asked_before_the_thread_starts_becomes_resident_without_a_request(
    backbone: Backbone, library: SlowLibrary
) -> None:
    key = library.keys[2]
    assert key is not None

    async def scenario() -> None:
        engine = make_engine(backbone, library)
        engine.pin(key, library.prefixes[key].spec)
        async with started(engine) as served:
            await until(lambda: key in served.residents())
            assert served.stats().resident_prefixes == 1
            assert served.stats().resident_prefix_bytes > 0

    in_loop(scenario())


@pytest.mark.parametrize("seed", range(3))
def test_every_stream_ends_exactly_once_under_random_aborts(
    backbone: Backbone, library: SlowLibrary, seed: int
) -> None:
    """Aborts before, during and after; failing loads, preemption, streams left unread: nothing is lost or leaks."""
    rng = random.Random(seed)
    broken = library.keys[3]
    assert broken is not None
    library.broken.add(broken)
    told: list[Event] = []  # through on_end, half of which raise

    def on_end(event: Finished | Failed) -> None:
        told.append(event)
        if len(told) % 2:
            raise ZeroDivisionError

    async def one(served: AsyncEngine, index: int) -> Event:
        await asyncio.sleep(rng.random() * 0.05)
        kinds: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
        request = library.request(
            f"r{index}", rng.randrange(9), [1] * rng.choice([1, 20, 60]), max_new_tokens=rng.choice([1, 5, 40]),
            **rng.choice(kinds),
        )
        stream = served.submit(request, on_end)
        fate = rng.random()
        if fate < 0.2:
            stream.abort()
        elif fate < 0.5:
            async for event in stream:
                if isinstance(event, Finished | Failed):
                    return event
                if rng.random() < 0.2:
                    break
            stream.abort()
        return (await drained(stream))[-1]

    async def scenario() -> None:
        engine = make_engine(backbone, library, blocks=40, max_rows=8, max_step_tokens=32)
        async with started(engine) as served:
            ends = await asyncio.gather(*(one(served, index) for index in range(40)))
            assert len({end.request_id for end in ends}) == 40
            assert sorted(told, key=lambda end: end.request_id) == sorted(ends, key=lambda end: end.request_id)
            aborted = [end for end in ends if isinstance(end, Finished)
                       and end.outputs[0].finish_reason is FinishReason.ABORT]
            assert aborted
        assert engine._ledger.available == engine._ledger.capacity

    in_loop(scenario())
