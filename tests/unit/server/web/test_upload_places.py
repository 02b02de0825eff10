"""Who may send an upload, who waits, and who gives way, by a clock that the tests own."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from starlette.requests import Request

from server.web.errors import Overloaded
from server.web.intake import Intake
from server.web.upload_places import CRAWL, GRACE_S, UploadPlaces
from tests.support.clock import Sender, run

SLOW = (1200, 1.0)
FAST = (CRAWL * 2, 1.0)


class Uploads:
    """Uploads of some tenants through the same places."""

    def __init__(self, most: int = 4, of_a_tenant: int = 2, patience_s: float = 30) -> None:
        self.places = UploadPlaces(most, of_a_tenant, patience_s)
        self.began: list[str] = []
        self.ended: list[tuple[str, str]] = []
        self._intake = Intake(30, 1 << 30)

    def start(self, tenant: str, flow: tuple[int, float], pieces: int = 1 << 30) -> asyncio.Task[None]:
        return asyncio.create_task(self._send(tenant, Sender(*flow), pieces))

    async def _send(self, tenant: str, sender: Sender, pieces: int) -> None:
        body = self._intake.begin()
        request = Request({"type": "http", "state": {"body": body}})
        try:
            async with self.places.place(request, tenant):
                self.began.append(tenant)
                for _ in range(pieces):
                    await body.next(sender.receive)
            self.ended.append((tenant, "whole"))
        except Overloaded as error:
            self.ended.append((tenant, "waited" if error.message.startswith("uploads") else "gave way"))


async def stop(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_uploads_that_crawl_give_way_to_one_that_waits() -> None:
    """Four at 1.2 KB/s held all places, for days; the fifth got nothing."""

    async def test() -> None:
        uploads = Uploads(most=4, of_a_tenant=4)
        crawling = [uploads.start("acme", SLOW) for _ in range(4)]
        await asyncio.sleep(1)
        await uploads.start("acme", FAST, pieces=10)
        assert uploads.ended == [("acme", "gave way"), ("acme", "whole")]
        assert sum(task.done() for task in crawling) == 1, "no more of them than needed"
        assert asyncio.get_running_loop().time() < 2 * GRACE_S + 10
        await stop(*crawling)

    run(test())


def test_uploads_that_flow_keep_their_places_and_who_waits_is_told_after_a_while() -> None:
    async def test() -> None:
        uploads = Uploads(most=4, of_a_tenant=2)
        flowing = [uploads.start("acme", FAST) for _ in range(2)]
        await asyncio.sleep(100)
        await uploads.start("acme", FAST)
        assert uploads.ended == [("acme", "waited")]
        assert asyncio.get_running_loop().time() == 130
        await stop(*flowing)
        await uploads.start("acme", FAST, pieces=1)
        assert uploads.ended[1:] == [("acme", "whole")]

    run(test())


def test_one_tenants_uploads_leave_places_to_others() -> None:
    async def test() -> None:
        uploads = Uploads(most=4, of_a_tenant=2)
        flood = [uploads.start("flood", FAST) for _ in range(20)]
        await asyncio.sleep(1)
        await asyncio.wait_for(uploads.start("acme", FAST, pieces=2), 5)
        assert uploads.ended == [("acme", "whole")] and uploads.began == ["flood", "flood", "acme"]
        await stop(*flood)

    run(test())


def test_a_free_place_goes_to_the_tenant_with_the_fewest() -> None:
    async def test() -> None:
        uploads = Uploads(most=2, of_a_tenant=2)
        first, second = uploads.start("flood", FAST), uploads.start("flood", FAST)
        await asyncio.sleep(1)
        waiting = [uploads.start("flood", FAST) for _ in range(5)] + [uploads.start("acme", FAST)]
        await asyncio.sleep(1)
        await stop(first)
        await asyncio.sleep(1)
        assert uploads.began == ["flood", "flood", "acme"]
        await stop(second, *waiting)

    run(test())


def test_another_tenants_upload_that_crawls_gives_way_where_all_places_are_taken() -> None:
    async def test() -> None:
        uploads = Uploads(most=2, of_a_tenant=1)
        crawling, flowing = uploads.start("slow", SLOW), uploads.start("fast", FAST)
        await asyncio.sleep(GRACE_S + 1)
        await uploads.start("acme", FAST, pieces=2)
        assert uploads.ended == [("slow", "gave way"), ("acme", "whole")]
        await stop(crawling, flowing)

    run(test())


def test_a_place_is_free_again_however_its_upload_ends() -> None:
    async def test() -> None:
        uploads = Uploads(most=1, of_a_tenant=1)
        for _ in range(3):
            await stop(upload := uploads.start("acme", FAST))
            upload = uploads.start("acme", FAST)
            await asyncio.sleep(2)
            await stop(upload)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(uploads.start("acme", FAST), 3)
        await uploads.start("acme", FAST, pieces=1)
        assert uploads.ended == [("acme", "whole")]

    run(test())
