"""``open_limiter(url)``: the limiter that goes with the registry at a URL.

Owns that choice, and where counting begins. In Redis it is for all replicas. Of a registry on disk each process counts
for itself: days and months begin with the usage that the registry knows, so that a restart gives nobody a new quota.
"""

from __future__ import annotations

import logging
from collections import Counter

from prefixes.errors import RegistryUnavailable
from prefixes.limiter.base import Limiter, Window
from prefixes.limiter.memory import MemoryLimiter
from prefixes.limiter.shared import SharedLimiter
from prefixes.registry import is_redis
from prefixes.usage.model import Kind, today
from prefixes.usage.store import UsageStore

_log = logging.getLogger("prefixd.limits")
_Used = Counter[tuple[str, str | None, str, Window]]


def open_limiter(url: str, usage: UsageStore, *, service: str) -> Limiter:
    """The limiter for one replica of ``service``. Raises RegistryUnavailable for a URL that cannot be used."""
    if not is_redis(url):
        limiter = MemoryLimiter()
        _count_on(limiter, usage)
        return limiter
    from prefixes.registry.redis.limiter import RedisLimiter
    from prefixes.registry.redis.url import parse_redis_url

    shared = SharedLimiter(RedisLimiter(parse_redis_url(url), service))
    shared.start()
    return shared


def _count_on(limiter: MemoryLimiter, usage: UsageStore) -> None:
    """Let it go on from what was used today and this month. Usage belongs to the day on which a request ended."""
    try:
        used = _used(usage, today())
    except RegistryUnavailable as error:  # of two evils: nobody is served, or a quota begins anew
        _log.error("quotas count from zero: usage cannot be read", extra={"facts": {"reason": error.message}})
        return
    for (tenant, key, counter, window), amount in used.items():
        limiter.count_from(tenant, key, counter, window, amount)


def _used(usage: UsageStore, day: str) -> _Used:
    used: _Used = Counter()
    for row in usage.read(day[:8] + "01", day):
        subject, counts = row.subject, row.counts
        amounts = {
            "tokens": counts.input_tokens + counts.prefix_tokens + counts.output_tokens,
            "training_steps": counts.training_steps,
        }
        if subject.kind is Kind.SHARED:  # its callers used it
            continue
        for key in {None, subject.key}:
            for counter, amount in amounts.items():
                used[subject.tenant, key, counter, Window.MONTH] += amount
                used[subject.tenant, key, counter, Window.DAY] += amount * (row.day == day)
    return used
