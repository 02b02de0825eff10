"""RedisLimiter: one limiter for all replicas, in the registry's Redis. Each call is one script, by Redis' own clock.

Owns its connections and what the scripts are asked and answer. Knows no registry: an emptied Redis counts from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from prefixes.limiter.base import Charge, Refused, State, Taken
from prefixes.registry.redis import limiter_scripts
from prefixes.registry.redis.errors import FAILURES, guarded
from prefixes.registry.redis.keys import TenantKeys, replicas_key
from prefixes.registry.redis.url import RedisTarget, disconnect


class RedisLimiter:
    """See ``limiter.shared.Remote``. ``service`` says whose replicas there are, ``clock`` is instead of Redis' own."""

    remote = True

    def __init__(self, target: RedisTarget, service: str, clock: Callable[[], float] | None = None) -> None:
        self._replicas, self._clock = replicas_key(service), clock
        with guarded():
            self._client = target.connect()
        self._take, self._settle, self._renew, self._announce = (
            self._client.register_script(text)
            for text in (
                limiter_scripts.TAKE, limiter_scripts.SETTLE, limiter_scripts.RENEW, limiter_scripts.ANNOUNCE
            )
        )  # fmt: skip

    def take(self, tenant: str, reservation_id: str, charges: Sequence[Charge], ttl_s: float) -> Taken | Refused:
        asked: list[str | int] = []
        for charge in charges:
            asked += [charge.field, charge.counter, charge.window, charge.limit, charge.amount]
        with guarded():
            taken, *told = self._take(_keys(tenant), [self._now(), reservation_id, repr(ttl_s), *asked])
        numbers = [float(text) for text in told]
        states = tuple(
            State(charge, int(numbers[at]), numbers[at + 1], numbers[at + 2])
            for at, charge in zip(range(0, len(numbers), 3), charges, strict=True)
        )
        return Taken(states) if taken else Refused(states)

    def settle(self, tenant: str, reservation_id: str, used: Mapping[str, int]) -> None:
        pairs = [word for pair in used.items() for word in pair]
        with guarded():
            self._settle(_keys(tenant), [self._now(), reservation_id, *pairs])

    def renew(self, tenant: str, reservation_ids: Sequence[str], ttl_s: float) -> None:
        with guarded():
            self._renew(_keys(tenant), [self._now(), repr(ttl_s), *reservation_ids])

    def announce(self, replica: str, expires_s: float) -> int:
        with guarded():
            return int(self._announce([self._replicas], [self._now(), replica, repr(expires_s)]))

    def close(self) -> None:
        with suppress(*FAILURES):
            disconnect(self._client)

    def _now(self) -> str:
        return repr(self._clock()) if self._clock else ""


def _keys(tenant: str) -> list[str]:
    keys = TenantKeys(tenant)
    return [keys.counters, keys.reservations, keys.reserved]
