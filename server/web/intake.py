"""Intake: the bodies that have not arrived whole, and whether the process still takes any.

Owns how long a body may pause and take, how slow it may be, and how much memory all of them have together. When that is
full, the body with the most bytes times seconds of silence gives way, so that one that flows is not refused for those
that stand still. Knows no socket, and no body's meaning.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

from starlette.types import Message, Receive

from prefixes.errors import PrefixdError, ShuttingDown
from server.web.errors import Overloaded, RequestTimeout

SLOWEST: Final = 1 << 10
"""Bytes per second. Every so many give a body one more second to be waited for."""


class Intake:
    """One per process, for both of its ports. A shutdown sets ``draining`` first: answers then end their connection."""

    def __init__(self, body_timeout_s: float, max_unfinished_bytes: int) -> None:
        self.body_timeout_s = body_timeout_s
        self.max_unfinished_bytes = max_unfinished_bytes
        self.draining = False
        self.held = 0  # bytes of unfinished bodies in memory
        self._bodies: set[Body] = set()
        self._closed = False

    def begin(self, most_held: int | None = None, within_s: float = math.inf) -> Body:
        """Begin to read a body, which must be whole ``within_s`` seconds from now.

        No more than ``most_held`` of its bytes stay in memory; None: all of them do.
        """
        body = Body(self, most_held, within_s)
        self._bodies.add(body)
        if self._closed:
            body.refuse(_closing())
        return body

    def close(self) -> None:
        """Refuse the bodies that have not arrived whole, and those that come."""
        self._closed = True
        for body in list(self._bodies):
            body.refuse(_closing())

    def hold(self, body: Body, more: int) -> None:
        """Count ``more`` bytes of ``body``, and refuse others if there are too many of all."""
        body.held += more
        self.held += more
        now = asyncio.get_running_loop().time()
        while self.held > self.max_unfinished_bytes:
            others = (other for other in self._bodies if other is not body and other.held)
            stuck = max(others, key=lambda other: other.held * (now - other.heard_at), default=None)
            if stuck is None:
                return  # a single body is bounded by itself
            stuck.refuse(
                Overloaded(
                    f"body: expected at most {self.max_unfinished_bytes} bytes in all of requests that have not "
                    "arrived whole, got more, and this one stood still",
                    expected=self.max_unfinished_bytes,
                )
            )

    def forget(self, body: Body) -> None:
        """Count ``body`` no more: it is whole, refused or given up."""
        self._bodies.discard(body)
        self.held -= body.held
        body.held = 0


class Body:
    """One body while it arrives. ``got`` counts its bytes, ``held`` those of them that are in memory."""

    def __init__(self, intake: Intake, most_held: int | None, within_s: float) -> None:
        self.got = self.held = 0
        self.whole = False
        self.heard_at = asyncio.get_running_loop().time()
        self._intake = intake
        self._most_held, self._within_s = most_held, within_s
        self._due = self.heard_at + within_s
        self._waited = 0.0
        self._waiting: asyncio.Timeout | None = None
        self._refusal: PrefixdError | None = None

    async def next(self, receive: Receive) -> Message:
        """The next piece, or the client's leave. Raises RequestTimeout, Overloaded, ShuttingDown."""
        loop, most = asyncio.get_running_loop(), self._intake.body_timeout_s
        began = loop.time()
        patience = min(most, most + self.got / SLOWEST - self._waited, self._due - began)
        try:
            if self._refusal:
                raise self._refusal
            async with asyncio.timeout(patience) as self._waiting:
                message = await receive()
        except TimeoutError:
            raise self._refusal or self._too_slow(most, late=loop.time() >= self._due) from None
        finally:
            self._waiting = None
            self.heard_at = loop.time()
            self._waited += self.heard_at - began
        self._note(len(message.get("body", b"")), whole=not message.get("more_body", False))
        return message

    def refuse(self, error: PrefixdError) -> None:
        """Make its reader, at once if it waits, raise ``error``."""
        self._intake.forget(self)
        self._refusal = error
        if self._waiting and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    def _note(self, size: int, *, whole: bool) -> None:
        self.got += size
        self.whole = whole
        if whole:
            self._intake.forget(self)
        elif self._refusal is None:
            room = size if self._most_held is None else min(size, self._most_held - self.held)
            self._intake.hold(self, room)

    def _too_slow(self, most: float, *, late: bool) -> RequestTimeout:
        if late:
            text = f"body: expected to arrive whole within {self._within_s:g} s, got {self.got} bytes by then"
            return RequestTimeout(text, expected=self._within_s, got=self.got)
        return RequestTimeout(
            f"body: expected pauses of at most {most:g} s and {SLOWEST} bytes a second, got {self.got} bytes, and then "
            "nothing for too long",
            expected=most,
            got=self.got,
        )


def _closing() -> ShuttingDown:
    return ShuttingDown("the process is shutting down, and the request had not arrived whole")
