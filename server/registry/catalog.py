"""Catalog: what the registry holds, for the event loop and for the engine.

Owns how long a known reference is used, and the way from a PrefixKey to a verified prefix. A reference is used for
``alias_ttl_s`` after its read. If the registry announces its changes, it is used until one is announced, at most for
``ANNOUNCED_TTL_S``. While the registry is away, it is used for ``max_stale_s`` since it was last known to be true.
Known references are read again now and then, so that an outage finds none too old. The registry is synchronous: every
call goes to a thread. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, ParamSpec, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter

from prefixes.artifact import Prefix, read_prefix
from prefixes.errors import EngineFailure, InvalidArtifact, PrefixdError, RegistryUnavailable
from prefixes.registry.base import Resolved, Store
from prefixes.spec import BackboneSpec, TaskRef, check_compatible
from server.engine.types import PrefixKey
from server.registry.link import RegistryLink
from server.registry.outages import TenantOutages
from server.tiers.tiers import PrefixTiers

MAX_KNOWN: Final = 16384
"""References that are remembered. Beyond that the least recently requested is dropped."""
ANNOUNCED_TTL_S: Final = 10.0
"""A reference is read again after this long, even if changes are announced."""
KEEP_S: Final = 0.05
"""The shortest pause between two rounds of ``keep_known``, for a very small ``max_stale_s``."""
WAIT_S: Final = 2.0
"""How long a request waits for the registry. It may be away before the probe finds out."""
RESOLVE_THREADS: Final = 8
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


@dataclass(frozen=True)
class _Known:
    resolved: Resolved
    at: float  # time.monotonic() seconds when its read began; it was true then
    generation: int  # of the announcements at that time
    outdated: bool = False  # a change was, or may have been, made that has not been read yet


class Catalog:
    """Resolves references and loads prefixes for one backbone. Only ``load`` may be called outside the event loop.

    Concurrent reads of one reference share one read. Errors are never remembered.
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
        self._ttl, self._max_stale = alias_ttl_s, max_stale_s
        self._known: dict[TaskRef, _Known] = {}  # least recently requested first
        self._reads: dict[TaskRef, asyncio.Task[Resolved]] = {}
        self._refs: dict[tuple[str, str], set[TaskRef]] = {}  # the known references, by task
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

    async def resolve(self, ref: TaskRef) -> Resolved:
        """The version behind ``ref``, as fresh as the module says, and made for this backbone.

        Raises TaskNotFound, RegistryUnavailable, IncompatiblePrefix.
        """
        known = self._known.get(ref)
        if known is None or not self._is_fresh(known):
            resolved = await self._read(ref, known)
        else:
            resolved = known.resolved
        if ref in self._known:
            self._known[ref] = self._known.pop(ref)
        check_compatible(resolved.spec, self._backbone)
        return resolved

    def forget(self, tenant: str, name: str) -> None:
        """Forget what is known about a task that this process has just changed, and read it again."""
        self._abandon_reads(tenant, name)
        for ref in list(self._refs.get((tenant, name), ())):
            self._drop(ref)
            self._begin(ref)

    def changed(self, tenant: str, name: str) -> None:
        """A change was announced, or may have been made. Read what is known again, before a request asks for it.

        If the registry goes away before that, the version known until now is used, as on every replica that the
        announcement has not reached.
        """
        self._abandon_reads(tenant, name)
        for ref in list(self._refs.get((tenant, name), ())):
            known = self._known[ref]
            self._known[ref] = replace(known, at=self._true_at(known), outdated=True)
            self._begin(ref)

    async def keep_known(self) -> None:
        """Until cancelled, read again, one by one, what was last known to be true ``max_stale_s / 4`` ago.

        Otherwise an outage could find a reference too old to use. That happens if changes are polled and nobody asked
        for it, or if the connection that announced them has been made anew since.
        """
        while self._max_stale:
            await asyncio.sleep(max(KEEP_S, self._max_stale / 16))
            for number, ref in enumerate(list(self._known)):
                if number % 256 == 0:
                    await asyncio.sleep(0)  # there may be thousands, nearly all of them young
                known = self._known.get(ref)
                if known is None or time.monotonic() - self._true_at(known) < self._max_stale / 4:
                    continue
                try:
                    self._link.require_up()
                    self._outages.require_up(ref.tenant)
                    async with asyncio.timeout(WAIT_S):
                        await asyncio.shield(self._reads.get(ref) or self._begin(ref))
                except (PrefixdError, TimeoutError):
                    pass  # the task is gone or cannot be read; _begin has settled that
                except Exception:
                    _log.exception("a known task could not be read again")

    async def check(self) -> None:
        """Raise RegistryUnavailable if the registry has been away for longer than known tasks are served."""
        if not self._link.up and self._link.age_s > self._max_stale:
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

    def _is_fresh(self, known: _Known) -> bool:
        age = time.monotonic() - known.at
        announced = age < ANNOUNCED_TTL_S and self._link.is_announcing(known.generation)
        return not known.outdated and (age < self._ttl or announced)

    def _is_servable(self, known: _Known) -> bool:
        """Whether it was true recently enough to be used while the registry is away."""
        return time.monotonic() - self._true_at(known) <= self._max_stale

    def _true_at(self, known: _Known) -> float:
        """When it was last known to be true: at its read, or later, as long as no change was announced."""
        announced = None if known.outdated else self._link.announced_until(known.generation)
        return max(known.at, announced or known.at)

    async def _read(self, ref: TaskRef, known: _Known | None) -> Resolved:
        try:
            self._link.require_up()
            self._outages.require_up(ref.tenant)
            read = self._reads.get(ref) or self._begin(ref)
            async with asyncio.timeout(WAIT_S):
                return await asyncio.shield(read)
        except (RegistryUnavailable, TimeoutError) as error:
            if known is not None and self._is_servable(known):
                return known.resolved
            if isinstance(error, TimeoutError):
                raise RegistryUnavailable("registry: it did not answer in time") from None
            raise

    def _abandon_reads(self, tenant: str, name: str) -> None:
        """Forget the running reads of a task, which may miss a change. Only the callers that wait already get them."""
        for ref in [ref for ref in self._reads if (ref.tenant, ref.name) == (tenant, name)]:
            del self._reads[ref]

    def _begin(self, ref: TaskRef) -> asyncio.Task[Resolved]:
        began, generation = time.monotonic(), self._link.generation
        threads = self._trying if self._outages.trying(ref.tenant) else self._resolving
        read = asyncio.create_task(anyio.to_thread.run_sync(self._resolve, ref, began, limiter=threads))
        self._reads[ref] = read

        def settle(read: asyncio.Task[Resolved]) -> None:
            failure = None if read.cancelled() else read.exception()  # exception() also marks it as retrieved
            if self._reads.get(ref) is not read:
                return
            del self._reads[ref]
            if failure is None and not read.cancelled():
                self._remember(ref, _Known(read.result(), began, generation))
            elif not isinstance(failure, RegistryUnavailable):
                self._drop(ref)

        read.add_done_callback(settle)
        return read

    def _remember(self, ref: TaskRef, known: _Known) -> None:
        while ref not in self._known and len(self._known) >= MAX_KNOWN:
            self._drop(next(iter(self._known)))
        self._known[ref] = known
        self._refs.setdefault((ref.tenant, ref.name), set()).add(ref)

    def _drop(self, ref: TaskRef) -> None:
        if self._known.pop(ref, None) is None:
            return
        refs = self._refs[ref.tenant, ref.name]
        refs.discard(ref)
        if not refs:
            del self._refs[ref.tenant, ref.name]
