"""Memory is given back once for all who freed some at about the same time, behind them."""

from __future__ import annotations

import asyncio
import threading

from server.tiers.trimming import TrimSoon


def test_those_who_ask_at_about_the_same_time_share_one_trim_behind_them() -> None:
    told: list[int] = []

    async def run() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def trim() -> None:
            told.append(threading.get_ident())
            loop.call_soon_threadsafe(done.set)

        soon = TrimSoon(trim, 0.01)
        for expected in (1, 2):
            for _ in range(3):
                soon()
            assert len(told) == expected - 1
            await asyncio.wait_for(done.wait(), 20)
            done.clear()
            assert len(told) == expected

    asyncio.run(run())
    assert threading.get_ident() not in told
