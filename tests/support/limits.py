"""Sets limits in a registry's document, and counts what a limiter is asked. Knows no test."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefixes.limiter.base import Charge, Refused, Taken, Window
from prefixes.limiter.memory import MemoryLimiter
from prefixes.tenancy.limits import Limits
from prefixes.tenancy.records import tenancy_from_json, tenancy_to_json
from prefixes.tenancy.store import TenancyStore


def set_limits(store: TenancyStore, *, tenants: Mapping[str, Limits] = {}, keys: Mapping[str, Limits] = {}) -> None:
    """Give tenants and keys, by their names and ids, these limits."""
    stored = store.read()
    state = tenancy_from_json(stored.data)
    changed = replace(
        state,
        tenants={**state.tenants, **{name: replace(state.tenants[name], limits=own) for name, own in tenants.items()}},
        keys={**state.keys, **{name: replace(state.keys[name], limits=own) for name, own in keys.items()}},
    )
    assert store.replace(tenancy_to_json(changed), stored.revision)


@dataclass
class CountedLimiter:
    """A limiter in memory whose calls are counted, with their threads. ``remote`` makes it one behind a network.

    Its takes and settlements wait while ``taking`` and ``settling`` are not set.
    """

    remote: bool = False
    now: float = 1_800_014_400.0  # noon, UTC
    calls: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    renewed: list[str] = field(default_factory=list)
    taking: threading.Event = field(default_factory=threading.Event)
    settling: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._inner = MemoryLimiter(lambda: self.now)
        self.taking.set()
        self.settling.set()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())

    def take(self, tenant: str, reservation_id: str, charges: Sequence[Charge], ttl_s: float) -> Taken | Refused:
        self._called("take")
        assert self.taking.wait(60)
        return self._inner.take(tenant, reservation_id, charges, ttl_s)

    def settle(self, tenant: str, reservation_id: str, used: Mapping[str, int]) -> None:
        self._called("settle")
        assert self.settling.wait(60)
        self._inner.settle(tenant, reservation_id, used)
        self.calls.append("settled")

    def renew(self, tenant: str, reservation_ids: Sequence[str], ttl_s: float) -> None:
        self._called("renew")
        self.renewed += reservation_ids
        self._inner.renew(tenant, reservation_ids, ttl_s)

    def close(self) -> None:
        self.calls.append("close")

    def used(self, counter: str, window: Window, *, tenant: str = "acme", key: str | None = None) -> int:
        """What counts now."""
        probe = Charge(counter, window, 10**12, 0, key)
        return self._inner.take(tenant, "probe", [probe], 1e-9).states[0].used
