"""Places for uploads that are on their way: so many in a process, so many of them one tenant's.

Owns who may begin to send, and whose upload gives way. One that crawls keeps its place only while nobody waits for it;
one that flows keeps it to its end. Knows no route, and no upload's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from server.web.errors import Overloaded
from server.web.intake import Body

CRAWL: Final = 32 << 10
"""Bytes per second, on average. An upload that is slower gives way to one that waits."""
GRACE_S: Final = 5.0
"""How long an upload may have been on its way before its speed is judged."""
LOOK_S: Final = 0.5
"""How often one that waits looks whether another crawls."""


@dataclass(frozen=True, eq=False)
class _Upload:
    tenant: str
    body: Body
    since: float

    def speed(self, now: float) -> float:
        return self.body.got / max(now - self.since, GRACE_S)

    def crawls(self, now: float) -> bool:
        return not self.body.whole and now - self.since >= GRACE_S and self.speed(now) < CRAWL


class UploadPlaces:
    """One per process. All its methods belong to one event loop."""

    def __init__(self, most: int, most_of_a_tenant: int, patience_s: float) -> None:
        """Who has no place after ``patience_s`` seconds is refused."""
        self._most, self._most_of_a_tenant, self._patience_s = most, most_of_a_tenant, patience_s
        self._held: set[_Upload] = set()
        self._waiting: list[str] = []  # the tenant of each
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def place(self, request: Request, tenant: str) -> AsyncIterator[None]:
        """Hold a place for ``request``'s body while the block runs. Raises Overloaded; inside, reading the body may."""
        body: Body | None = getattr(request.state, "body", None)
        if body is None:  # there is none to come
            yield
            return
        upload = await self._enter(tenant, body)
        try:
            yield
        finally:
            self._held.discard(upload)
            self._changed.set()

    async def _enter(self, tenant: str, body: Body) -> _Upload:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        self._waiting.append(tenant)
        try:
            while not self._make_room(tenant, loop.time()):
                left = deadline - loop.time()
                if left <= 0:
                    raise self._full(tenant)
                await self._wait(min(LOOK_S, left))
        finally:
            self._waiting.remove(tenant)
            self._changed.set()
        upload = _Upload(tenant, body, loop.time())
        self._held.add(upload)
        return upload

    async def _wait(self, seconds: float) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _make_room(self, tenant: str, now: float) -> bool:
        """Whether ``tenant`` may take a place now; if need be, take it from the slowest of those that crawl."""
        own = [upload for upload in self._held if upload.tenant == tenant]
        if len(own) < self._most_of_a_tenant and len(self._held) < self._most:
            return self._is_next(len(own))
        blocking = own if len(own) >= self._most_of_a_tenant else self._held
        crawling = [found for found in blocking if found.crawls(now)]
        slowest = min(crawling, key=lambda found: found.speed(now), default=None)
        if slowest is None or not (slowest.tenant == tenant or self._is_next(len(own))):
            return False
        self._held.discard(slowest)
        slowest.body.refuse(
            Overloaded(
                f"body: expected {CRAWL} bytes a second where others wait to send, got {slowest.speed(now):.0f}",
                expected=CRAWL, got=round(slowest.speed(now)),
            )
        )  # fmt: skip
        return True

    def _is_next(self, own: int) -> bool:
        """Whether no tenant that waits has fewer places than ``own``."""
        held = Counter(upload.tenant for upload in self._held)
        return own <= min(held[tenant] for tenant in self._waiting)

    def _full(self, tenant: str) -> Overloaded:
        own = sum(upload.tenant == tenant for upload in self._held)
        if own >= self._most_of_a_tenant:
            return Overloaded(
                f"uploads: expected at most {self._most_of_a_tenant} of a tenant at once, got {own} and one more",
                expected=self._most_of_a_tenant,
            )
        return Overloaded(
            f"uploads: expected at most {self._most} at once, got {len(self._held)} and one more", expected=self._most
        )
