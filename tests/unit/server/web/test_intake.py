"""Bodies while they arrive: how long they may pause, how slow they may be, and how much all of them may hold."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from prefixes.errors import ShuttingDown
from server.web.errors import Overloaded, RequestTimeout
from server.web.intake import SLOWEST, Intake
from tests.support.clock import Sender, run


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_body_that_pauses_for_longer_than_allowed_is_refused() -> None:
    async def test() -> None:
        intake, sender = Intake(30, 1 << 20), Sender(10, 29, count=1)
        body = intake.begin()
        await body.next(sender.receive)
        with pytest.raises(RequestTimeout, match=r"expected pauses of at most 30 s and 1024 bytes a second, got 10 by"):
            await body.next(sender.receive)
        assert now() <= 29 + 30

    run(test())


def test_a_body_that_trickles_is_refused_although_it_never_pauses_for_long() -> None:
    async def test() -> None:
        intake, sender = Intake(30, 1 << 20), Sender(1, 29)
        body = intake.begin()
        with pytest.raises(RequestTimeout):
            while True:
                await body.next(sender.receive)
        assert body.got < 3 and now() <= 31

    run(test())


def test_a_body_of_the_least_speed_arrives_however_long_it_takes() -> None:
    async def test() -> None:
        intake, sender = Intake(30, 1 << 30), Sender(2 * SLOWEST, 2)
        body = intake.begin()
        for _ in range(500):
            await body.next(sender.receive)
        assert now() == pytest.approx(1000)

    run(test())


def test_what_the_server_does_between_two_pieces_does_not_count_against_their_sender() -> None:
    async def test() -> None:
        intake, sender = Intake(30, 1 << 20), Sender(1, 0.0)
        body = intake.begin()
        for _ in range(5):
            await body.next(sender.receive)
            await asyncio.sleep(1000)

    run(test())


def test_beyond_the_total_the_body_gives_way_that_holds_most_for_longest() -> None:
    async def test() -> None:
        intake = Intake(1e6, 1000)
        stuck = [intake.begin() for _ in range(3)]
        for body, size in zip(stuck, (300, 500, 100), strict=True):
            await body.next(Sender(size, 0).receive)
        waiting = asyncio.create_task(stuck[1].next(Sender(0, 1e9).receive))
        await asyncio.sleep(1)
        flowing = intake.begin()
        for _ in range(4):
            await flowing.next(Sender(100, 0).receive)
        with pytest.raises(Overloaded, match="at most 1000 bytes in all"):
            await waiting
        assert intake.held == 300 + 100 + 400
        await stuck[0].next(Sender(0, 0).receive)  # the others go on

    run(test())


@pytest.mark.parametrize("most", [None, 150])
def test_bytes_are_counted_until_the_body_is_whole_and_never_beyond_what_stays_in_memory(most: int | None) -> None:
    async def test() -> None:
        intake = Intake(30, 1 << 20)
        body, other = intake.begin(most), intake.begin()
        await other.next(Sender(7, 0).receive)
        for _ in range(3):
            await body.next(Sender(100, 0).receive)
        assert intake.held == 7 + min(300, most or 300)

        async def last() -> Message:
            return {"type": "http.request", "body": b"x", "more_body": False}

        await body.next(last)
        assert intake.held == 7
        intake.forget(body)
        intake.forget(other)
        assert intake.held == 0

    run(test())


def test_a_shutdown_refuses_bodies_that_wait_and_those_that_begin() -> None:
    async def test() -> None:
        intake = Intake(30, 1 << 20)
        body = intake.begin()
        waiting = asyncio.create_task(body.next(Sender(0, 1e9).receive))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        intake.close()
        for refused in (waiting, intake.begin().next(Sender(1, 0).receive)):
            with pytest.raises(ShuttingDown):
                await refused

    run(test())


def test_a_body_that_flows_for_ever_is_refused_at_its_end() -> None:
    """An upload of 1 GiB at 1.2 KB/s was within every bound, for ten days."""

    async def test() -> None:
        intake, sender = Intake(30, 1 << 20), Sender(1200, 1)
        body, forever = intake.begin(within_s=60), intake.begin()
        with pytest.raises(RequestTimeout, match=r"expected to arrive whole within 60 s, got 7.... bytes by then"):
            while True:
                await body.next(sender.receive)
        assert now() == 60
        for _ in range(100):
            await forever.next(Sender(1200, 1).receive)

    run(test())
