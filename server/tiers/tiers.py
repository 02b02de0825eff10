"""Where an artifact's bytes come from: host memory, then the local disk, then the registry.

Owns the order, the bound on host memory, and the rule that concurrent loads of one artifact share one load. Copies are
kept by tenant *and* version: a digest that one tenant has stored is never another's hit. Knows no format and no store:
it gets ``fetch``, and a reader that checks the digest.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from prefixes.errors import InvalidArtifact
from server.engine.memory.shares import Kept, Shares

REGISTRY: Final = "registry"

_T = TypeVar("_T")
_log = logging.getLogger("prefixd.server")


class Cache(Protocol):
    """A byte-bounded tier in front of the registry. It is thread-safe and raises no errors."""

    @property
    def name(self) -> str:
        """Its label in metrics and logs."""

    @property
    def limit_bytes(self) -> int:
        """The most that ``nbytes`` may be."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    @property
    def failures(self) -> int:
        """The number of operations that failed."""

    def entries(self) -> list[tuple[str, str, int]]:
        """(tenant, version, bytes), the least recently used first."""

    def holds(self, tenant: str, version: str) -> bool:
        """Whether it has a copy, which may be damaged."""

    def get(self, tenant: str, version: str) -> bytes | None:
        """The copy, unverified, or None."""

    def put(self, tenant: str, version: str, data: bytes) -> None:
        """Keep ``data`` if it fits at all, and evict others for it."""

    def drop(self, tenant: str, version: str) -> None:
        """Delete the copy."""


class HostCache:
    """Artifacts in this process's memory. Evicts a tenant's least recently used first; whose, ``Shares`` says."""

    name: Final = "host"
    failures: Final = 0

    def __init__(self, max_bytes: int, shares: Shares | None = None) -> None:
        """``shares`` counts bytes."""
        self.limit_bytes, self._shares = max_bytes, shares or Shares()
        self._data: dict[tuple[str, str], bytes] = {}  # least recently used first
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """See Cache."""
        return self._nbytes

    def entries(self) -> list[tuple[str, str, int]]:
        """See Cache."""
        with self._lock:
            return [(tenant, version, len(data)) for (tenant, version), data in self._data.items()]

    def holds(self, tenant: str, version: str) -> bool:
        """See Cache."""
        with self._lock:
            return (tenant, version) in self._data

    def get(self, tenant: str, version: str) -> bytes | None:
        """See Cache."""
        with self._lock:
            data = self._data.pop((tenant, version), None)
            if data is not None:
                self._data[tenant, version] = data
                self._shares.used(Kept.PREFIXES, tenant, 0, 0)
            return data

    def put(self, tenant: str, version: str, data: bytes) -> None:
        """See Cache."""
        if len(data) > self.limit_bytes:
            return
        with self._lock:
            self._forget((tenant, version))
            self._shares.used(Kept.PREFIXES, tenant, len(data), len(data))  # before room is made for it
            while self._nbytes + len(data) > self.limit_bytes:
                self._evict()
            self._data[tenant, version] = data
            self._nbytes += len(data)

    def drop(self, tenant: str, version: str) -> None:
        """See Cache."""
        with self._lock:
            self._forget((tenant, version))

    def _evict(self) -> None:
        yielding = self._shares.first_to_yield({tenant for tenant, _ in self._data})
        self._forget(next(key for key in self._data if key[0] == yielding))

    def _forget(self, key: tuple[str, str]) -> None:
        if (data := self._data.pop(key, None)) is not None:
            self._nbytes -= len(data)
            self._shares.gone(Kept.PREFIXES, key[0], len(data))


@dataclass(frozen=True)
class TierStats:
    """One tier as it is now."""

    tier: str
    entries: int
    nbytes: int
    limit_bytes: int


@dataclass(frozen=True)
class TiersStats:
    """All tiers before the registry, and counts since the start.

    ``reads``: loads by the tier that answered, including ``registry``. ``damaged``: a tier's copies that were not what
    had been published. ``failures``: operations that a tier could not do.
    """

    tiers: tuple[TierStats, ...]
    reads: Mapping[str, int]
    damaged: Mapping[str, int]
    failures: Mapping[str, int]


class PrefixTiers:
    """Loads artifacts from the nearest tier that has them. Thread-safe."""

    def __init__(self, fetch: Callable[[str, str], bytes], caches: tuple[Cache, ...]) -> None:
        """``fetch(tenant, version)`` reads from the registry. ``caches`` stand before it, the nearest first."""
        self._fetch, self._caches = fetch, caches
        self._flights: dict[tuple[str, str], Future[Any]] = {}
        self._reads: Counter[str] = Counter(dict.fromkeys((*(cache.name for cache in caches), REGISTRY), 0))
        self._damaged: Counter[str] = Counter(dict.fromkeys((cache.name for cache in caches), 0))
        self._lock = threading.Lock()

    def load(self, tenant: str, version: str, read: Callable[[bytes], _T]) -> _T:
        """The result of ``read`` on the artifact's bytes. Concurrent callers share one load, its error included.

        ``read`` verifies the digest and raises InvalidArtifact for other bytes. Then the tier's copy is thrown away and
        the next tier is asked. Raises what ``fetch`` raises, and InvalidArtifact only for the registry's own copy.
        """
        key = (tenant, version)
        with self._lock:
            flight, first = self._flights.get(key), False
            if flight is None:
                flight, first = Future(), True
                self._flights[key] = flight
        if not first:
            shared: _T = flight.result()
            return shared
        try:
            loaded = self._load(tenant, version, read)
        except BaseException as error:
            self._land(key)
            flight.set_exception(error)
            raise
        self._land(key)
        flight.set_result(loaded)
        return loaded

    def holds(self, tenant: str, version: str) -> bool:
        """Whether a tier before the registry has a copy."""
        return any(cache.holds(tenant, version) for cache in self._caches)

    def entries(self) -> dict[str, list[tuple[str, str, int]]]:
        """(tenant, version, bytes) of what each tier holds."""
        return {cache.name: cache.entries() for cache in self._caches}

    def stats(self) -> TiersStats:
        """The numbers for the metrics."""
        with self._lock:
            reads, damaged = dict(self._reads), dict(self._damaged)
        return TiersStats(
            tiers=tuple(TierStats(c.name, len(c.entries()), c.nbytes, c.limit_bytes) for c in self._caches),
            reads=reads,
            damaged=damaged,
            failures={cache.name: cache.failures for cache in self._caches},
        )

    # --- inside ---

    def _load(self, tenant: str, version: str, read: Callable[[bytes], _T]) -> _T:
        for index, cache in enumerate(self._caches):
            data = cache.get(tenant, version)
            if data is None:
                continue
            try:
                loaded = read(data)
            except InvalidArtifact as error:
                cache.drop(tenant, version)
                self._count(self._damaged, cache.name)
                facts = {"tier": cache.name, "tenant": tenant, "version": version, "reason": error.message}
                _log.warning("a kept copy of an artifact is damaged and was thrown away", extra={"facts": facts})
                continue
            self._answered(tenant, version, data, cache.name, self._caches[:index])
            return loaded
        data = self._fetch(tenant, version)
        loaded = read(data)
        self._answered(tenant, version, data, REGISTRY, self._caches)
        return loaded

    def _answered(self, tenant: str, version: str, data: bytes, by: str, nearer: tuple[Cache, ...]) -> None:
        self._count(self._reads, by)
        for cache in nearer:
            cache.put(tenant, version, data)

    def _count(self, counter: Counter[str], name: str) -> None:
        with self._lock:
            counter[name] += 1

    def _land(self, key: tuple[str, str]) -> None:
        with self._lock:
            del self._flights[key]
