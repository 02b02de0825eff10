"""Writes a registry, jobs and datasets as commit 3b858cc keeps them. Run it with that commit's code, once:

    PYTHONPATH=<a checkout of 3b858cc> python tests/stored/write.py OUT

It and the two modules beside it import that commit's modules by the names they had there, so it runs with no other
commit, and mypy leaves it out. Owns the form: a folder is as the disk has it, Redis is written down as commands, a JSON
list a line, where bytes that are no UTF-8 are ``{"base64": ...}``. Beside each stands what 3b858cc reads of it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from write_jobs import jobs_as_read, told_jobs
from write_registry import registry_as_read, tell_registry, tell_restoring

from prefixes.registry import open_registry
from prefixes.registry.redis_url import parse_redis_url
from tests.support.redis_server import RedisServer
from trainer.jobs.disk_store import DiskJobStore
from trainer.jobs.local_queue import LocalQueue
from trainer.jobs.redis_store import RedisJobStore
from trainer.jobs.saq_queue import PATIENCE, SaqQueue

LEASE_S = 4


def main(out: Path) -> None:
    out.mkdir()
    with tempfile.TemporaryDirectory() as work, RedisServer() as server, server.client() as client:
        job = asyncio.run(disk_jobs(out))
        registry(out / "registry-disk", f"disk://{out}/registry-disk", f"disk://{out}/restoring-disk", job, Path(work))
        job = asyncio.run(redis_jobs(out, server))
        restored = RedisServer()
        with restored, restored.client() as other:
            client.flushall()
            registry(out / "registry-redis", server.url, restored.url, job, Path(work))
            save_commands(out / "registry-redis.jsonl", client)
            save_commands(out / "restoring-redis.jsonl", other)


def registry(name: Path, url: str, restoring: str, job: str, work: Path) -> None:
    with closing(open_registry(url)) as store:
        tell_registry(store, url, job, work / name.name)
        save(name.with_suffix(".json"), registry_as_read(store))
        tell_restoring(restoring, store)


async def disk_jobs(out: Path) -> str:
    store = DiskJobStore(out / "trainer-disk")
    async with told_jobs(store, LocalQueue(), out / "trainer-disk") as names:
        save(out / "trainer-disk.json", await jobs_as_read(store, out / "trainer-disk", names))
    await store.close()
    return names["sealed"]


async def redis_jobs(out: Path, server: RedisServer) -> str:
    target = parse_redis_url(server.url)
    store = RedisJobStore(target.connect_asyncio())
    queue = SaqQueue(target.connect_asyncio(patience=PATIENCE), "worker-1", lease_s=LEASE_S)
    async with told_jobs(store, queue, out / "trainer-redis") as names:
        with server.client() as client:
            save_commands(out / "trainer-redis.jsonl", client)
        save(out / "trainer-redis.json", await jobs_as_read(store, out / "trainer-redis", names))
    await store.close()
    await queue.close()
    return names["sealed"]


def save(path: Path, read: dict[str, Any]) -> None:
    path.write_text(json.dumps(read, indent=1, ensure_ascii=False) + "\n")


def save_commands(path: Path, client: Any) -> None:
    """Write down everything in Redis, as the commands that make it."""
    made: list[list[Any]] = []
    for key in sorted(client.scan_iter(count=1000)):
        kind, left_ms = client.type(key).decode(), client.pttl(key)
        if kind == "string":
            made.append(["SET", key, client.get(key)])
        elif kind == "list":
            made.append(["RPUSH", key, *client.lrange(key, 0, -1)])
        elif kind == "set":
            made.append(["SADD", key, *sorted(client.smembers(key))])
        elif kind == "hash":
            made.append(["HSET", key, *(part for pair in sorted(client.hgetall(key).items()) for part in pair)])
        elif kind == "zset":
            pairs = client.zrange(key, 0, -1, withscores=True)
            made.append(["ZADD", key, *(part for member, score in pairs for part in (f"{score:.17g}", member))])
        else:
            assert kind == "stream", kind
            for entry, fields in client.xrange(key):
                made.append(["XADD", key, entry, *(part for pair in fields.items() for part in pair)])
        if left_ms > 0:
            made.append(["PEXPIRE", key, str(left_ms)])
    lines = (json.dumps([text_of(part) for part in command], ensure_ascii=False) for command in made)
    path.write_text("".join(f"{line}\n" for line in lines))


def text_of(part: str | bytes) -> Any:
    try:
        return part.decode() if isinstance(part, bytes) else part
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(part).decode()}  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
