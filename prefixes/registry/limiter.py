"""``open_limiter(url)``: the limiter that goes with the registry at a URL.

Owns that choice. In Redis it is for all replicas. Of a registry on disk each process counts for itself.
"""

from __future__ import annotations

from prefixes.limiter.base import Limiter
from prefixes.limiter.memory import MemoryLimiter
from prefixes.limiter.shared import SharedLimiter
from prefixes.registry import is_redis


def open_limiter(url: str, *, service: str) -> Limiter:
    """The limiter for one replica of ``service``. Raises RegistryUnavailable for a URL that cannot be used."""
    if not is_redis(url):
        return MemoryLimiter()
    from prefixes.registry.redis.limiter import RedisLimiter
    from prefixes.registry.redis.url import parse_redis_url

    limiter = SharedLimiter(RedisLimiter(parse_redis_url(url), service))
    limiter.start()
    return limiter
