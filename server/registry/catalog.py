"""Catalog: what the registry holds, for the event loop and for the engine.

Owns what is known of references and when it is read, and the way from a PrefixKey to a verified prefix. A reference is
used for ``alias_ttl_s`` after its read. If the registry announces its changes, it is used until one is announced, at
most for ``ANNOUNCED_TTL_S``. While the registry is away, it is used for ``max_stale_s`` since it was last known to be
true. Known references are read again now and then, so that an outage finds none too old. That a task does not exist is
believed as well, see ``freshness``. The registry is synchronous: every call goes to a thread. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, ParamSpec, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter

from prefixes.artifact import Prefix, read_prefix
from prefixes.errors import EngineFailure, InvalidArtifact, PrefixdError, RegistryUnavailable, TaskNotFound
from prefixes.registry.base import Resolved, Store
from prefixes.spec import BackboneSpec, TaskRef, check_compatible
from server.engine.types import PrefixKey
from server.registry.freshness import Absent, Freshness, Known
from server.registry.link import RegistryLink
from server.registry.outages import TenantOutages
from server.registry.references import References
from server.registry.turns import Turns
from server.tiers.tiers import PrefixTiers

MAX_KNOWN: Final = 16384
"""References that are remembered. Beyond that the least recently requested is dropped."""
MAX_ABSENT: Final = 4096
"""References to what does not exist that are remembered. They are kept apart and push out no known one."""
KEEP_S: Final = 0.05
"""The shortest pause between two rounds of ``keep_known``, for a very small ``max_stale_s``."""
WAIT_S: Final = 2.0
"""How long a request waits for the registry. It may be away before the probe finds out."""
RESOLVE_THREADS: Final = 8
RESOLVES_EACH: Final = 6
"""Of one tenant that asks, at once."""
RESOLVES_WAITING: Final = 1024
"""Of one tenant that asks."""
TRY_THREADS: Final = 2
"""For tenants whose last read failed slowly. However many they are, the others keep their threads."""
CALL_THREADS: Final = 8
"""Uploads, changes and inspections have these of their own, so that they never keep a request from finding its task."""
LISTS: Final = 1
"""At once. A list of ten thousand tasks takes seconds of the interpreter, which the engine needs as well."""
LIST_WAIT_S: Final = 20.0
"""How long a list waits for the lists before it."""

_log = logging.getLogger("prefixd.registry")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Catalog:
    """Resolves references and loads prefixes for one backbone. Only ``load`` may be called outside the event loop.

    Concurrent reads of one reference share one read. Of errors only TaskNotFound is remembered.
    """

    def __init__(
        self,
        link: RegistryLink,
        backbone: BackboneSpec,
        tiers: PrefixTiers,
        *,
        alias_ttl_s: float,
        max_stale_s: float,
    ) -> None:
        self.tiers = tiers
        self._link, self._backbone = link, backbone
        self._freshness = Freshness(link, alias_ttl_s=alias_ttl_s, max_stale_s=max_stale_s)
        self._known, self._absent = References[Known](MAX_KNOWN), References[Absent](MAX_ABSENT)
        self._reads: dict[TaskRef, asyncio.Task[Resolved]] = {}
        self._turns = Turns(RESOLVE_THREADS, RESOLVES_EACH, RESOLVES_WAITING)
        self._outages = TenantOutages()
        self._resolving, self._trying, self._calling, self._listing = (
            CapacityLimiter(most) for most in (RESOLVE_THREADS, TRY_THREADS, CALL_THREADS, LISTS)
        )

    @property
    def registry(self) -> Store:
        """The store whose methods ``call`` runs."""
        return self._link.registry

    async def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a registry call off the loop, on few threads, so that a slow registry cannot take them all.

        Raises RegistryUnavailable at once while the registry is known to be away.
        """
        self._link.require_up()
        operation = getattr(function, "__name__", "call").strip("_")
        return await anyio.to_thread.run_sync(
            lambda: self._link.call(operation, function, *args, **kwargs), limiter=self._calling
        )

    async def call_alone(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """As ``call``, but one at a time, for calls that read all tasks."""
        try:
            async with asyncio.timeout(LIST_WAIT_S):
                await self._listing.acquire()
        except TimeoutError:
            raise RegistryUnavailable(
                f"registry: expected a turn within {LIST_WAIT_S:g} s, got none: other lists are read first; ask again"
            ) from None
        try:
            return await self.call(function, *args, **kwargs)
        finally:
            self._listing.release()

    def require_up(self) -> None:
        """Raise RegistryUnavailable while the registry is known to be away."""
        self._link.require_up()

    async def resolve(self, ref: TaskRef, caller: str | None = None) -> Resolved:
        """The version behind ``ref``, as fresh as the module says, and made for this backbone.

        ``caller`` is the tenant that asks, the task's own where none is given: reads are shared fairly between them.
        Raises TaskNotFound, RegistryUnavailable, IncompatiblePrefix.
        """
        known = self._known.get(ref)
        absent = self._absent.get(ref)
        if absent and self._freshness.is_absent(absent):
            self._absent.requested(ref)
            raise TaskNotFound(absent.message, **absent.detail)
        if known is None or not self._freshness.is_fresh(known):
            resolved = await self._read(ref, known, caller or ref.tenant)
        else:
            resolved = known.resolved
        self._known.requested(ref)
        check_compatible(resolved.spec, self._backbone)
        return resolved

    def forget(self, tenant: str, name: str) -> None:
        """Forget what is known about a task that this process has just changed, and read it again."""
        self._abandon_reads(tenant, name)
        for ref in self._known.of_task(tenant, name):
            self._known.drop(ref)
            self._begin(ref, ref.tenant)

    def changed(self, tenant: str, name: str) -> None:
        """A change was announced, or may have been made. Read what is known again, before a request asks for it.

        If the registry goes away before that, the version known until now is used, as on every replica that the
        announcement has not reached.
        """
        self._abandon_reads(tenant, name)
        for ref in self._known.of_task(tenant, name):
            if known := self._known.get(ref):
                self._known.put(ref, replace(known, at=self._freshness.true_at(known), outdated=True))
            self._begin(ref, ref.tenant)

    async def keep_known(self) -> None:
        """Until cancelled, read again, one by one, what was last known to be true ``max_stale_s / 4`` ago.

        Otherwise an outage could find a reference too old to use. That happens if changes are polled and nobody asked
        for it, or if the connection that announced them has been made anew since.
        """
        while self._freshness.max_stale_s:
            await asyncio.sleep(max(KEEP_S, self._freshness.max_stale_s / 16))
            for number, ref in enumerate(list(self._known)):
                if number % 256 == 0:
                    await asyncio.sleep(0)  # there may be thousands, nearly all of them young
                known = self._known.get(ref)
                if known is None or time.monotonic() - self._freshness.true_at(known) < self._freshness.max_stale_s / 4:
                    continue
                try:
                    self._link.require_up()
                    self._outages.require_up(ref.tenant)
                    async with asyncio.timeout(WAIT_S):
                        await asyncio.shield(self._reads.get(ref) or self._begin(ref, ref.tenant))
                except (PrefixdError, TimeoutError):
                    pass  # the task is gone or cannot be read; _begin has settled that
                except Exception:
                    _log.exception("a known task could not be read again")

    async def check(self) -> None:
        """Raise RegistryUnavailable if the registry has been away for longer than known tasks are served."""
        if not self._link.up and self._link.age_s > self._freshness.max_stale_s:
            self._link.require_up()

    def require_loadable(self, key: PrefixKey, is_resident: Callable[[], bool]) -> None:
        """Raise RegistryUnavailable if no tier has the prefix and the registry is known to be away.

        So a stream is refused with a status, before its first byte. The registry may be away for this tenant alone.
        """
        try:
            self._link.require_up()
            self._outages.require_up(key.tenant)
        except RegistryUnavailable:
            if not (is_resident() or self.tiers.holds(key.tenant, key.version)):
                raise

    def load(self, key: PrefixKey) -> Prefix:
        """A verified prefix, from the nearest tier that has it. May be called in any thread.

        Raises RegistryUnavailable, TaskNotFound, IncompatiblePrefix. Raises EngineFailure for bytes that are not what
        was published, because the caller is not at fault.
        """

        def read(data: bytes) -> Prefix:
            return read_prefix(data, expected_version=key.version)

        try:
            prefix = self.tiers.load(key.tenant, key.version, read)
        except InvalidArtifact as error:
            raise EngineFailure(f"prefix {key.version}: the registry's copy is damaged: {error.message}") from error
        check_compatible(prefix.spec, self._backbone)
        return prefix

    # --- inside ---

    def _resolve(self, ref: TaskRef, wanted_at: float) -> Resolved:
        """In a thread: ask the registry, and note whether it answers for the tenant."""
        self._outages.require_none_since(ref.tenant, wanted_at)
        began = time.monotonic()
        try:
            resolved = self._link.call("resolve", self.registry.resolve, ref)
        except RegistryUnavailable as error:
            self._outages.failed(ref.tenant, time.monotonic() - began, error)
            raise
        except PrefixdError:
            self._outages.answered(ref.tenant)
            raise
        self._outages.answered(ref.tenant)
        return resolved

    async def _read(self, ref: TaskRef, known: Known | None, caller: str) -> Resolved:
        try:
            self._link.require_up()
            self._outages.require_up(ref.tenant)
            read = self._reads.get(ref) or self._begin(ref, caller)
            async with asyncio.timeout(WAIT_S):
                return await asyncio.shield(read)
        except (RegistryUnavailable, TimeoutError) as error:
            if known is not None and self._freshness.is_servable(known):
                return known.resolved
            if isinstance(error, TimeoutError):
                raise RegistryUnavailable("registry: it did not answer in time") from None
            raise

    def _abandon_reads(self, tenant: str, name: str) -> None:
        """Forget the running reads of a task, which may miss a change. Only the callers that wait already get them.

        What a read before has found absent may be there now.
        """
        for ref in self._absent.of_task(tenant, name):
            self._absent.drop(ref)
        for ref in [ref for ref in self._reads if (ref.tenant, ref.name) == (tenant, name)]:
            del self._reads[ref]

    def _begin(self, ref: TaskRef, caller: str) -> asyncio.Task[Resolved]:
        began, generation = time.monotonic(), self._link.generation
        trying = self._outages.trying(ref.tenant)

        async def ask() -> Resolved:
            if trying:
                return await anyio.to_thread.run_sync(self._resolve, ref, began, limiter=self._trying)
            async with self._turns.turn(caller):
                return await anyio.to_thread.run_sync(self._resolve, ref, began, limiter=self._resolving)

        read = asyncio.create_task(ask())
        self._reads[ref] = read

        def settle(read: asyncio.Task[Resolved]) -> None:
            failure = None if read.cancelled() else read.exception()  # exception() also marks it as retrieved
            if self._reads.get(ref) is not read:
                return
            del self._reads[ref]
            if failure is None and not read.cancelled():
                self._absent.drop(ref)
                self._known.put(ref, Known(read.result(), began, generation))
            elif not isinstance(failure, RegistryUnavailable):
                self._known.drop(ref)
                if isinstance(failure, TaskNotFound):
                    self._absent.put(ref, Absent(failure.message, failure.detail, began, generation))

        read.add_done_callback(settle)
        return read
