"""RedisSubscription: changes of the registry as Redis announces them.

Owns one connection and one thread. Announcements are lost only with the connection, and a connection counts as live
only while it answers pings, which go out several times a second. Every new connection is a new ``generation``. A ping
carries the time it was sent at: all earlier announcements arrive before its answer, however late that is read.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from prefixes.registry.redis.errors import FAILURES
from prefixes.registry.redis.keys import CHANGES
from prefixes.registry.redis.url import RedisTarget, disconnect

PING_S: Final = 0.1
LIVE_S: Final = 0.5
"""A connection is live while its last answered ping is at most so old."""
RETRY_S: Final = 0.5

_log = logging.getLogger("prefixd.registry")


class RedisSubscription:
    """See ``subscription.Subscription``."""

    def __init__(self, target: RedisTarget, on_change: Callable[[str, str], None]) -> None:
        self.generation, self.heard_at = 0, 0.0
        self._target, self._on_change = target, on_change
        self._connected = False
        self._told = False  # whether the log says that announcements are interrupted
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registry-watch", daemon=True)
        self._thread.start()

    def live(self) -> bool:
        return self._connected and time.monotonic() - self.heard_at < LIVE_S

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=2 * self._target.timeout_s)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except FAILURES as error:
                if not self._told:  # logged once, however often it is tried again
                    _log.info("registry announcements interrupted", extra={"facts": {"error": type(error).__name__}})
                self._told = True
            except Exception:  # an error of ``on_change``: without the log nobody would know of it
                _log.exception("registry announcements interrupted")
            self._connected = False
            self._closed.wait(RETRY_S)

    def _listen(self) -> None:
        client = self._target.connect()
        try:
            with contextlib.closing(client.pubsub()) as subscriber:
                subscriber.subscribe(CHANGES)
                pinged, received = 0.0, time.monotonic()
                while not self._closed.is_set():
                    message = subscriber.get_message(timeout=PING_S)
                    now = time.monotonic()
                    if message is not None:
                        received = now
                        self._take(message)
                    if self._connected and now - received >= LIVE_S:
                        return  # silent: announcements may have been lost before the next one
                    if now - pinged >= PING_S:
                        subscriber.ping(repr(now))
                        pinged = now
        finally:
            disconnect(client)

    def _take(self, message: dict[str, object]) -> None:
        kind, data = message["type"], message.get("data")
        if kind == "subscribe":
            self.generation += 1  # first: nobody may read the newer time with the older generation
            self.heard_at = time.monotonic()
            self._connected = True
            if self._told:
                _log.info("registry announcements again")
            self._told = False
        elif kind == "pong" and isinstance(data, bytes) and data:
            self.heard_at = float(data)
        elif kind == "message" and isinstance(data, bytes):
            tenant, _, name = data.decode(errors="replace").partition("/")
            self._on_change(tenant, name)
