"""What the registry holds, for the event loop and for the engine.

Owns how long an alias is believed, and the way from a PrefixKey to a verified prefix. The registry itself is
synchronous: every call goes to a thread. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter

from prefixes.artifact import Prefix, read_prefix
from prefixes.errors import EngineFailure, InvalidArtifact
from prefixes.registry.base import Registry, Resolved
from prefixes.spec import BackboneSpec, TaskRef, check_compatible
from server.engine.types import PrefixKey

MAX_CACHED: Final = 4096
REGISTRY_THREADS: Final = 8
READY_TTL_S: Final = 1.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Entry:
    read: asyncio.Task[Resolved]
    expires: float  # time.monotonic() seconds, counted from the beginning of the read


class Catalog:
    """Resolves references and loads prefixes for one backbone. All but ``load`` belongs to the event loop.

    An alias is believed for ``alias_ttl_s`` after its read began; a local change is seen at once, see ``forget``.
    Reads of one reference that are under way at the same time are one read; errors are never remembered.
    """

    def __init__(self, registry: Registry, backbone: BackboneSpec, *, alias_ttl_s: float) -> None:
        self.registry = registry
        self._backbone = backbone
        self._ttl = alias_ttl_s
        self._entries: dict[TaskRef, _Entry] = {}
        self._threads: CapacityLimiter | None = None  # made on the loop that uses it
        self._checked_until = 0.0

    async def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a registry call off the loop, with few threads, so that a slow registry cannot take them all."""
        if self._threads is None:
            self._threads = CapacityLimiter(REGISTRY_THREADS)
        return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=self._threads)

    async def resolve(self, ref: TaskRef) -> Resolved:
        """The version behind ``ref``, now or at most ``alias_ttl_s`` ago, and made for this backbone.

        Raises TaskNotFound, RegistryUnavailable, IncompatiblePrefix.
        """
        entry = self._entries.get(ref)
        if entry is None or time.monotonic() >= entry.expires:
            entry = self._begin(ref)
        resolved = await asyncio.shield(entry.read)
        check_compatible(resolved.spec, self._backbone)
        return resolved

    def forget(self, tenant: str, name: str) -> None:
        """Believe nothing about a task any more: this process has just changed it."""
        for ref in [ref for ref in self._entries if (ref.tenant, ref.name) == (tenant, name)]:
            del self._entries[ref]

    async def check(self) -> None:
        """Raise RegistryUnavailable unless the registry answered within the last second."""
        if time.monotonic() >= self._checked_until:
            await self.call(self.registry.check)
            self._checked_until = time.monotonic() + READY_TTL_S

    def load(self, key: PrefixKey) -> Prefix:
        """Fetch and verify a prefix, in whichever thread the engine loads.

        Raises RegistryUnavailable, TaskNotFound, IncompatiblePrefix; bytes that are not what was published are
        EngineFailure: whoever asks for the task is not at fault.
        """
        data = self.registry.fetch(key.tenant, key.version)
        try:
            prefix = read_prefix(data, expected_version=key.version)
        except InvalidArtifact as error:
            raise EngineFailure(f"prefix {key.version}: the registry's copy is damaged: {error.message}") from error
        check_compatible(prefix.spec, self._backbone)
        return prefix

    def _begin(self, ref: TaskRef) -> _Entry:
        now = time.monotonic()
        if len(self._entries) >= MAX_CACHED:
            self._entries = {known: entry for known, entry in self._entries.items() if entry.expires > now}
        entry = _Entry(asyncio.create_task(self.call(self.registry.resolve, ref)), now + self._ttl)
        if len(self._entries) < MAX_CACHED:
            self._entries[ref] = entry

        def forget_errors(read: asyncio.Task[Resolved]) -> None:
            failed = read.cancelled() or read.exception() is not None  # asking also marks the exception as seen
            if failed and self._entries.get(ref) is entry:
                del self._entries[ref]

        entry.read.add_done_callback(forget_errors)
        return entry


def validate_upload(data: bytes, backbone: BackboneSpec) -> Prefix:
    """The prefix in ``data``, whole, finite and made for ``backbone``. Raises InvalidArtifact, IncompatiblePrefix."""
    prefix = read_prefix(data)
    check_compatible(prefix.spec, backbone)
    return prefix


