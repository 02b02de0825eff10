"""Checks before serving that a Redis keeps its data: version, role, eviction, persistence.

Owns what is required, what is advised, and how to set it. Reads INFO alone: managed services forbid CONFIG.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import redis
from redis.cluster import RedisCluster

from prefixes.errors import RegistryUnavailable

MINIMUM_VERSION: Final = (6, 2)


def inspect_servers(client: redis.Redis | RedisCluster, *, cluster: bool) -> list[str]:
    """Advice, a line each. Raises RegistryUnavailable for a server that would lose data, and redis.RedisError."""
    if cluster:
        nodes = client.info(target_nodes=RedisCluster.PRIMARIES)
        infos = nodes if nodes and isinstance(next(iter(nodes.values())), dict) else {"": nodes}
    else:
        infos = {"": client.info()}
    if not cluster and any(int(info.get("cluster_enabled", 0)) for info in infos.values()):
        raise RegistryUnavailable("registry: expected one server, got a node of a Cluster, whose URL is redis+cluster://")
    return list(dict.fromkeys(line for info in infos.values() for line in inspect_info(info)))


def inspect_info(info: Mapping[str, Any]) -> list[str]:
    """As ``inspect_servers``, for one server's INFO."""
    version = str(info.get("redis_version", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < MINIMUM_VERSION:
        raise RegistryUnavailable(f"registry: expected Redis {_dotted(MINIMUM_VERSION)} or newer, got {version}")
    if info.get("role") in ("slave", "replica"):
        raise RegistryUnavailable("registry: expected Redis' master, got a replica: it takes no writes")
    warnings = []
    policy, limit = str(info.get("maxmemory_policy", "noeviction")), int(info.get("maxmemory", 0))
    if policy != "noeviction":
        advice = f"maxmemory-policy: expected noeviction, got {policy}: set `maxmemory-policy noeviction`"
        if limit:
            raise RegistryUnavailable(f"registry: {advice}: this Redis would throw prefixes away when it is full")
        warnings.append(f"{advice}; it matters as soon as there is a maxmemory")
    if not int(info.get("aof_enabled", 0)):
        saved = int(info.get("rdb_saves", 0)) or int(info.get("rdb_last_save_time", 0)) > _started(info)
        warnings.append(
            "persistence: expected the append-only file, found "
            + ("snapshots alone: the last minutes are lost with a crash" if saved else "none in use")
            + ": set `appendonly yes`"
        )
    elif info.get("aof_last_write_status", "ok") != "ok":
        warnings.append("persistence: Redis' last write to its append-only file failed: look at its disk")
    if limit and int(info.get("used_memory", 0)) > 0.9 * limit:
        warnings.append(f"memory: over 90 % of the maxmemory of {limit} bytes is used: publishing will soon be refused")
    return warnings


def _started(info: Mapping[str, Any]) -> int:
    return int(info.get("server_time_usec", 0)) // 1_000_000 - int(info.get("uptime_in_seconds", 0)) + 1


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
