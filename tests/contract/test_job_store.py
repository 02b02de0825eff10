"""Every JobStore keeps the promises of trainer/jobs/base.py."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixes.registry.redis.url import parse_redis_url
from tests.support.redis_server import RedisServer
from trainer.jobs import disk_store, redis_store
from trainer.jobs.base import JobStore
from trainer.jobs.disk_store import DiskJobStore
from trainer.jobs.errors import Fenced, JobConflict, JobNotFound, JobStoreUnavailable
from trainer.jobs.job import cancelled, claimed, failed, lost, new_job, progressed, succeeded
from trainer.jobs.open_job import open_job_of
from trainer.jobs.record import Change, Event, Job
from trainer.jobs.redis_store import PREFIX, RedisJobStore

Opener = Callable[[], AsyncIterator[JobStore]]
KINDS = ("disk", "redis")
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


class Place:
    """Where jobs are kept over the lives of several stores."""

    def __init__(self, kind: str, folder: Path, redis: RedisServer) -> None:
        self.kind, self._folder, self._redis = kind, folder, redis
        redis.flush()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[JobStore]:
        store: JobStore
        if self.kind == "disk":
            store = DiskJobStore(self._folder)
        else:
            store = RedisJobStore(parse_redis_url(self._redis.url).connect_asyncio())
        try:
            yield store
        finally:
            await store.close()

    def run(self, test: Callable[[JobStore], Awaitable[None]]) -> None:
        async def body() -> None:
            async with self.open() as store:
                await test(store)

        asyncio.run(body())


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, redis: RedisServer) -> Place:
    return Place(request.param, tmp_path, redis)


async def add(store: JobStore, tenant: str = "acme", **spec: Any) -> Job:
    return await store.create(new_job(tenant, f"tenant:{tenant}", spec))


def names(events: list[Event]) -> list[str]:
    return [event.data.get("state", event.name) for event in events]


def test_a_job_is_as_it_was_written_also_after_a_restart(place: Place) -> None:
    made: list[Job] = []

    async def write(store: JobStore) -> None:
        job = await add(store, task="acme/e2e", config={"seed": 1})
        assert await store.get("acme", job.id) == job
        made.append(await store.change("acme", job.id, lambda found: claimed(found, 1, "machine")))
        made[:] = [await store.change("acme", job.id, lambda found: progressed(found, 1, {"step": 3}, "training"))]

    async def read(store: JobStore) -> None:
        assert await store.get("acme", made[0].id) == made[0]
        assert await store.jobs("acme", limit=10) == made
        assert await store.open_jobs() == [open_job_of(made[0])]
        assert names(await store.events("acme", made[0].id)) == ["queued", "running", "running", "progress"]

    place.run(write)
    place.run(read)


def test_another_tenants_job_is_none(place: Place) -> None:
    async def test(store: JobStore) -> None:
        job = await add(store)
        for call in (
            store.get("other", job.id),
            store.change("other", job.id, cancelled),
            store.events("other", job.id),
            store.delete("other", job.id),
            store.get("acme", "job-of-nobody"),
        ):
            with pytest.raises(JobNotFound):
                await call
        assert await store.jobs("other", limit=10) == []
        assert await store.get("acme", job.id) == job

    place.run(test)


def test_a_task_that_writes_in_a_loop_can_be_cancelled_at_any_moment(place: Place) -> None:
    """redis-py lost a cancellation that came while it sent: the worker then held a job for ever that was another's."""

    async def test(store: JobStore) -> None:
        job = await store.change("acme", (await add(store)).id, lambda found: claimed(found, 1, "one"))

        async def write() -> None:
            while True:
                await store.change("acme", job.id, lambda found: progressed(found, 1, {"step": 1}, "training"))

        for moment in range(100):
            task = asyncio.create_task(write())
            for _ in range(moment):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=PATIENCE_S)
            assert task.cancelled(), f"it goes on; cancelled after {moment} rounds of the loop"

    place.run(test)


def test_a_move_that_is_refused_changes_nothing(place: Place) -> None:
    async def test(store: JobStore) -> None:
        job = await add(store)
        with pytest.raises(Fenced):
            await store.change("acme", job.id, lambda found: succeeded(found, 1, {}))
        assert await store.get("acme", job.id) == job
        assert names(await store.events("acme", job.id)) == ["queued"]

    place.run(test)


def test_of_many_who_claim_one_job_one_gets_it(place: Place) -> None:
    async def test(store: JobStore) -> None:
        job = await add(store)

        async def claim(number: int) -> bool:
            try:
                await store.change("acme", job.id, lambda found: claimed(found, 1, f"machine-{number}"))
            except Fenced:
                return False
            return True

        assert sum(await asyncio.gather(*(claim(number) for number in range(20)))) == 1
        assert names(await store.events("acme", job.id)) == ["queued", "running"]

    place.run(test)


def test_changes_at_once_are_all_made_one_after_the_other(place: Place) -> None:
    async def test(store: JobStore) -> None:
        job = await add(store)

        def count(found: Job) -> Change:
            number = found.progress.get("count", 0) + 1
            return Change(replace(found, progress={"count": number}), (Event("progress", {"count": number}),))

        await asyncio.gather(*(store.change("acme", job.id, count) for _ in range(30)))
        events = await store.events("acme", job.id)
        assert [event.data.get("count") for event in events[1:]] == list(range(1, 31))

    place.run(test)


def test_events_go_on_behind_any_of_them(place: Place) -> None:
    async def test(store: JobStore) -> None:
        job = await add(store)
        await store.change("acme", job.id, lambda found: claimed(found, 1, "machine"))
        for step in range(5):
            await store.change("acme", job.id, lambda found, s=step: progressed(found, 1, {"step": s}, "training"))  # type: ignore[misc]
        whole = await store.events("acme", job.id)
        assert len({event.id for event in whole}) == len(whole) == 8
        for index, event in enumerate(whole):
            assert await store.events("acme", job.id, event.id) == whole[index + 1 :]
        for nonsense in ("", "abc", "-1", "9" * 50, "9" * 5000, "1-1-1", "\n"):
            assert len(await store.events("acme", job.id, nonsense)) in (0, len(whole))

    place.run(test)


def test_a_long_history_is_not_read_on_the_event_loop(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watched a job of 10,000 events from the first held up everybody while they were parsed."""
    threads: set[int] = set()

    def noted(*fields: Any, **named: Any) -> Event:
        threads.add(threading.get_ident())
        return Event(*fields, **named)

    async def write(store: JobStore) -> None:
        ended.append(await add(store))
        await store.change("acme", ended[0].id, cancelled)

    async def read(store: JobStore) -> None:
        monkeypatch.setattr(redis_store, "Event", noted)
        monkeypatch.setattr(disk_store, "Event", noted)
        assert names(await store.events("acme", ended[0].id)) == ["queued", "cancelled"]
        assert threads and threading.get_ident() not in threads

    ended: list[Job] = []
    place.run(write)
    place.run(read)


def test_who_watches_hears_of_every_change_and_misses_none_between_two_looks(place: Place) -> None:
    async def test(store: JobStore) -> None:
        job = await add(store)
        with store.watch(job.id) as watch:
            await watch.wait(0.5)  # what a new connection brings
            await store.change("acme", job.id, lambda found: claimed(found, 1, "machine"))
            async with asyncio.timeout(10):
                await watch.wait(60)
                waiting = asyncio.create_task(watch.wait(60))
                await asyncio.sleep(0.05)
                await store.change("acme", job.id, cancelled)
                await waiting

    place.run(test)


def test_pages_of_jobs_hold_each_once_the_newest_first(place: Place) -> None:
    async def test(store: JobStore) -> None:
        made = []
        for _ in range(7):
            made.append((await add(store)).id)
            await asyncio.sleep(0.002)  # ids grow with the clock, in milliseconds
        await add(store, "other")
        seen: list[str] = []
        while page := await store.jobs("acme", limit=3, before=seen[-1] if seen else None):
            seen += [job.id for job in page]
        assert seen == made[::-1]

    place.run(test)


def test_pages_of_all_tenants_hold_each_job_once_the_newest_first(place: Place) -> None:
    async def test(store: JobStore) -> None:
        made = [await add(store, f"tenant-{number % 4}") for number in range(11)]
        made += [await add(store, "tenant-1") for _ in range(4)]
        newest = sorted((job.id for job in made), reverse=True)
        pages: list[list[str]] = []
        while not pages or len(pages[-1]) == 4:
            before = pages[-1][-1] if pages else None
            pages.append([job.id for job in await store.jobs(None, limit=4, before=before)])
        assert [job_id for page in pages for job_id in page] == newest
        await store.change("tenant-3", made[3].id, cancelled)
        assert [job.id for job in await store.jobs(None, limit=9, state="cancelled")] == [made[3].id]
        for job in made:
            assert await store.owner(job.id) == job.tenant
        for unknown in ("job-0", made[0].id[:-1], "tenant-1", "*"):
            with pytest.raises(JobNotFound):
                await store.owner(unknown)

    place.run(test)


def test_pages_of_a_state_are_full_however_many_jobs_of_others_lie_between(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "PAGE", 2)

    async def test(store: JobStore) -> None:
        made = []
        for _ in range(9):
            made.append((await add(store)).id)
            await asyncio.sleep(0.002)
        for number in (0, 1, 5):
            await store.change("acme", made[number], cancelled)
        wanted = [made[5], made[1], made[0]]
        first = await store.jobs("acme", limit=2, state="cancelled")
        rest = await store.jobs("acme", limit=2, state="cancelled", before=first[-1].id)
        assert [[job.id for job in page] for page in (first, rest)] == [wanted[:2], wanted[2:]]
        assert [job.id for job in await store.jobs("acme", limit=3, state="cancelled")] == wanted
        assert await store.jobs("acme", limit=3, state="running") == []
        assert await store.jobs("other", limit=3, state="cancelled") == []

    place.run(test)


def test_open_jobs_are_those_of_all_tenants_that_have_not_ended(place: Place) -> None:
    async def test(store: JobStore) -> None:
        waiting, running, ended = await add(store), await add(store, "other"), await add(store)
        await store.change("other", running.id, lambda found: claimed(found, 1, "machine"))
        await store.change("acme", ended.id, cancelled)
        assert {job.id for job in await store.open_jobs()} == {waiting.id, running.id}
        again = await store.change("other", running.id, lambda found: lost(found, 1))
        assert {(job.id, job.state) for job in await store.open_jobs()} == {
            (waiting.id, "queued"), (again.id, "queued")
        }  # fmt: skip

    place.run(test)


def test_what_has_ended_can_be_forgotten_and_nothing_of_it_stays(place: Place, redis: RedisServer) -> None:
    async def test(store: JobStore) -> None:
        job = await add(store)
        with pytest.raises(JobConflict):
            await store.delete("acme", job.id)
        ended = await store.change("acme", job.id, cancelled)
        assert await store.delete("acme", job.id) == ended
        with pytest.raises(JobNotFound):
            await store.get("acme", job.id)
        assert await store.jobs("acme", limit=10) == []

    place.run(test)
    with redis.client() as client:
        assert client.keys(f"{PREFIX}*") == []


def test_random_changes_leave_record_lists_and_events_in_step(place: Place) -> None:
    random_of = random.Random(7)

    async def test(store: JobStore) -> None:
        jobs = [await add(store) for _ in range(4)]
        for _ in range(120):
            job = random_of.choice(jobs)
            found = await store.get("acme", job.id)
            move = random_of.choice((
                lambda j: claimed(j, j.token, "m"), lambda j: lost(j, j.token), cancelled,
                lambda j: progressed(j, j.token, {"step": random_of.randrange(9)}, "training"),
            ))  # fmt: skip
            try:
                await store.change("acme", job.id, move)
            except (Fenced, JobConflict):
                assert await store.get("acme", job.id) == found
            now = await store.get("acme", job.id)
            states = [event.data["state"] for event in await store.events("acme", job.id) if event.name == "state"]
            assert states[-1] == now.state
            assert (now.id in {job.id for job in await store.open_jobs()}) == (not now.ended)

    place.run(test)


# --- one store alone ---


def test_a_second_service_on_one_folder_is_told_to_use_redis(tmp_path: Path) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            place = Place.__new__(Place)
            place.kind, place._folder = "disk", tmp_path
            await stack.enter_async_context(place.open())
            with pytest.raises(JobStoreUnavailable, match="--redis"):
                DiskJobStore(tmp_path)

    asyncio.run(test())


def test_a_folder_survives_a_death_in_the_middle_of_a_write(tmp_path: Path) -> None:
    async def make() -> str:
        store = DiskJobStore(tmp_path)
        job = await add(store)
        await store.change("acme", job.id, lambda found: claimed(found, 1, "machine"))
        await store.close()
        return job.id

    job_id = asyncio.run(make())
    folder = tmp_path / "jobs" / job_id
    for half in (".tmp-0123", ".job.json.x.part.json", "job.json.part"):  # the latter as earlier releases left them
        (folder / half).write_text("{")
    events = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(events[: -len('"state": "running"}}')])  # the last one, cut off
    (tmp_path / "jobs" / "job-000000000000-0000000000000000").mkdir()  # made, and nothing written

    async def read() -> None:
        store = DiskJobStore(tmp_path)
        assert [job.id for job in await store.open_jobs()] == [job_id]
        assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "job.json"]
        assert len(await store.events("acme", job_id)) == 2
        job = await store.change("acme", job_id, lambda found: failed(found, 1, _failure()))
        assert [event.id for event in await store.events("acme", job_id)] == ["1", "2", "3"]
        assert job.state == "failed"
        await store.close()

    asyncio.run(read())


def test_events_that_a_full_disk_cuts_off_are_told_once_when_there_is_room(tmp_path: Path) -> None:
    """The first of two was appended again, under the same number."""
    script = """
import resource, sys
from pathlib import Path
from trainer.jobs.disk_store import _append, _read_events
from trainer.jobs.job import Event
path, told = Path(sys.argv[1]), [Event("state", {"n": n}, str(n)) for n in (1, 2, 3)]
_append(path, told[:1])
limit = path.stat().st_size + 60  # room for one more, and a part of the next
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    _append(path, told[1:])
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _append(path, told[1:])
    print([event.id for event in _read_events(path)])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "events.jsonl"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "['1', '2', '3']\n", done.stderr


def test_a_damaged_record_is_named_and_not_thrown_away(tmp_path: Path) -> None:
    async def make() -> str:
        store = DiskJobStore(tmp_path)
        job = await add(store)
        await store.close()
        return job.id

    path = tmp_path / "jobs" / asyncio.run(make()) / "job.json"
    path.write_text(json.dumps({"id": 1}))

    async def read() -> None:
        with pytest.raises(JobStoreUnavailable, match=r"job\.json"):
            DiskJobStore(tmp_path)

    asyncio.run(read())
    assert path.exists()


def test_a_change_whose_asker_is_cancelled_stays_no_surprise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_disk, waits = disk_store._to_disk, [0.3]

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(waits.pop() if waits else 0)
        to_disk(*arguments, **options)

    async def write() -> str:
        store = DiskJobStore(tmp_path)
        job = await add(store)
        await store.change("acme", job.id, lambda found: claimed(found, 1, "machine"))
        monkeypatch.setattr(disk_store, "_to_disk", slow)
        first = asyncio.create_task(
            store.change("acme", job.id, lambda found: progressed(found, 1, {"step": 1}, "training"))
        )
        await asyncio.sleep(0.1)
        first.cancel()
        await store.change("acme", job.id, lambda found: succeeded(found, 1, {}))
        await store.close()
        return job.id

    async def read(job_id: str) -> None:
        store = DiskJobStore(tmp_path)
        assert (await store.get("acme", job_id)).state == "succeeded"
        assert [event.id for event in await store.events("acme", job_id)] == ["1", "2", "3", "4", "5"]
        await store.close()

    asyncio.run(read(asyncio.run(write())))


def test_who_reads_events_while_a_change_is_made_takes_nothing_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_events, waits = disk_store._read_events, list[float]()

    def slow(*arguments: Any) -> list[Event]:
        found = read_events(*arguments)
        time.sleep(waits.pop() if waits else 0)
        return found

    async def test() -> None:
        store = DiskJobStore(tmp_path)
        job, ended = await add(store), await add(store)
        await store.change("acme", job.id, lambda found: claimed(found, 1, "machine"))
        await store.change("acme", ended.id, cancelled)
        await store.close()
        store = DiskJobStore(tmp_path)  # which has no events in memory yet
        monkeypatch.setattr(disk_store, "_read_events", slow)
        waits.append(0.3)
        reading = asyncio.create_task(store.events("acme", job.id))
        await asyncio.sleep(0.1)
        await store.change("acme", job.id, lambda found: lost(found, 1))
        await reading
        await store.change("acme", job.id, lambda found: claimed(found, 2, "machine"))
        assert [event.id for event in await store.events("acme", job.id)] == ["1", "2", "3", "4"]
        waits.append(0.3)
        reading = asyncio.create_task(store.events("acme", ended.id))
        await asyncio.sleep(0.1)
        await store.delete("acme", ended.id)
        with pytest.raises(JobNotFound):
            await reading
        await store.close()

    asyncio.run(test())


def test_a_job_that_could_not_be_kept_is_none_after_a_restart_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def test() -> None:
        store = DiskJobStore(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(disk_store, "_append", full)
            with pytest.raises(JobStoreUnavailable, match="No space left"):
                await add(store)
        assert await store.open_jobs() == []
        await store.close()
        store = DiskJobStore(tmp_path)
        assert await store.open_jobs() == []
        await store.close()

    asyncio.run(test())


def test_a_job_that_redis_keeps_already_because_the_first_answer_was_lost_is_no_error(redis: RedisServer) -> None:
    async def test() -> None:
        store = RedisJobStore(parse_redis_url(redis.url).connect_asyncio())
        change = new_job("acme", "tenant:acme", {})
        assert await store.create(change) == await store.create(change) == change.job
        assert len(await store.events("acme", change.job.id)) == 1
        with pytest.raises(JobStoreUnavailable):
            await store.create(Change(replace(change.job, actor="tenant:other")))
        await store.close()

    asyncio.run(test())


def test_jobs_of_a_tenant_that_a_scan_of_redis_gives_twice_are_listed_once(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        client = parse_redis_url(redis.url).connect_asyncio()
        once = client.scan_iter

        async def twice(**asked: Any) -> AsyncIterator[bytes]:  # as it may while Redis moves its table
            for key in 2 * [key async for key in once(**asked)]:
                yield key

        monkeypatch.setattr(client, "scan_iter", twice)
        store = RedisJobStore(client)
        made = [await add(store, "scanned") for _ in range(3)]
        listed = [job.id for job in await store.jobs(None, limit=100) if job.tenant == "scanned"]
        assert listed == sorted((job.id for job in made), reverse=True)
        await store.close()

    asyncio.run(test())


def test_jobs_in_a_redis_that_is_away_are_unavailable_and_come_back(redis: RedisServer) -> None:
    async def test() -> None:
        store = RedisJobStore(parse_redis_url(redis.url).connect_asyncio())
        job = await add(store)
        redis.pause()
        try:
            with pytest.raises(JobStoreUnavailable) as caught:
                async with asyncio.timeout(20):
                    await store.get("acme", job.id)
            assert "127.0.0.1" not in caught.value.message
        finally:
            redis.resume()
        assert await store.get("acme", job.id) == job
        await store.close()

    asyncio.run(test())


def _failure() -> Any:
    from trainer.jobs.record import Failure

    return Failure("crashed", "it did")
