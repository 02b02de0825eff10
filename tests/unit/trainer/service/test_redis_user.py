"""The deployment's trainer, and the user that docs/deploy.md names for jobs alone, can do all that jobs need.

What the trainer must not do is in ``tests/unit/docker/test_redis_users.py``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Final

import pytest
import redis

from prefixes.registry.redis.url import parse_redis_url
from tests.support.paths import ROOT
from tests.support.redis_server import SERVERS
from tests.support.redis_users import WITH_USERS, RedisWithUsers
from trainer.jobs.job import claimed, new_job, progressed, stopped
from trainer.jobs.record import Job
from trainer.jobs.redis_store import RedisJobStore
from trainer.jobs.saq_queue import PATIENCE, SaqQueue

PASSWORD: Final = "of-the-trainer"


@pytest.fixture(params=WITH_USERS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisWithUsers]:
    found = re.search(r"^(~prefixd-trainer:.*)$", (ROOT / "docs/deploy.md").read_text(), re.M)
    assert found is not None
    with RedisWithUsers(SERVERS[request.param]) as server:
        server.passwords["jobs"] = PASSWORD
        with server.client() as client:
            rules = ("on", f">{PASSWORD}", "resetchannels", *found[1].split())
            client.execute_command("ACL", "SETUSER", "jobs", *rules)
        yield server


@pytest.mark.parametrize("user", ["trainer", "jobs"])
def test_the_user_takes_a_job_from_its_queue_to_its_end(server: RedisWithUsers, user: str) -> None:
    async def work() -> Job:
        target = parse_redis_url(server.url_of(user, db=1))
        store = RedisJobStore(target.connect_asyncio())
        queue = SaqQueue(target.connect_asyncio(patience=PATIENCE), "worker", lambda tenant: 1.0, lease_s=2)
        ended = asyncio.Event()
        try:
            await store.check()
            job = await store.create(new_job("default", "somebody", {"task": "default/a"}))
            await queue.put(job)
            assert await queue.dead([job]) == []

            async def handle(tenant: str, job_id: str, token: int) -> None:
                await store.change(tenant, job_id, lambda job: claimed(job, token, "worker"))
                await queue.heartbeat(job)
                await store.change(tenant, job_id, lambda job: progressed(job, token, {"step": 1}, "training"))
                await store.change(tenant, job_id, lambda job: stopped(job, token))
                ended.set()

            working = asyncio.create_task(queue.work(handle, 1))
            with store.watch(job.id):
                await asyncio.wait_for(ended.wait(), 30)
            await asyncio.sleep(2.5)  # a round of what looks after lost deliveries
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            assert [event.name for event in await store.events("default", job.id)].count("progress") == 1
            assert [found.id for found in await store.jobs("default", limit=9)] == [job.id]
            assert [found.id for found in await store.jobs(None, limit=9)] == [job.id]
            assert await store.owner(job.id) == "default"
            assert [work.job_id for work in await queue.unsettled()] == [job.id]
            await queue.settle(job.id, 1)
            assert await queue.unsettled() == []
            return await store.delete("default", job.id)
        finally:
            await queue.close()
            await store.close()

    assert asyncio.run(work()).state == "cancelled"


def test_the_documented_user_reads_and_flushes_nothing_else(server: RedisWithUsers) -> None:
    host, port = server.address.split(":")
    with server.client() as client:
        client.set("prefixd:registry", "x")
    with redis.Redis(host, int(port), username="jobs", password=PASSWORD) as client:
        for command in (("GET", "prefixd:registry"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
