"""Jobs in a folder, for one service process: a file per job, a file of events beside it.

    <root>/jobs/<job id>/job.json          the record, and the events of its last change
    <root>/jobs/<job id>/events.jsonl      all events; those of the last change may be missing after a crash

Owns these files, and the lock that keeps a second service out. Records are in memory too, read once at the start. A
change is on disk before anybody sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from prefixes.files import write_json
from prefixes.files.folder import TEMPORARY, Folder
from trainer.jobs.base import MAX_EVENTS, Plan
from trainer.jobs.errors import JobNotFound, JobStoreUnavailable
from trainer.jobs.job import require_deletable
from trainer.jobs.open_job import OpenJob, open_job_of
from trainer.jobs.record import Change, Event, Job, State, job_from
from trainer.jobs.room import UNBOUNDED, Room
from trainer.jobs.signals import Signals, Watch

TAIL: Final = 1 << 16
"""Bytes: more than the events of any one change take."""
JOB_ID: Final = re.compile(r"job-[0-9a-f]{12}-[0-9a-f]{16}")
EVENT_BYTES: Final = 500
"""More than most events take. It bounds how much of a long job's events are read for the newest MAX_EVENTS."""
_LEFT: Final = (TEMPORARY, "job.json.part", ".job.json.")
"""How the names of half-written records begin, also those of earlier releases."""
_EVENT_ID: Final = re.compile(r"[0-9]{1,18}")


class DiskJobStore:
    """A JobStore. All its methods belong to one event loop.

    A write that has begun goes on to its end, even if its caller is cancelled meanwhile. A thread that writes cannot be
    stopped, and its write must be known here and must not come after a later change's.
    """

    def __init__(self, root: Path) -> None:
        """Open or make ``root``. Raises JobStoreUnavailable if another process has it, or if it cannot be used."""
        self._root = root
        try:
            (root / "jobs").mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(root / "jobs.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise JobStoreUnavailable(
                f"{root}: another trainer service works in this folder; several share one with --redis"
            ) from None
        except OSError as error:
            raise JobStoreUnavailable(f"{root}: expected a folder to write to: {error.strerror or error}") from None
        self._jobs: dict[str, Job] = {}
        self._open: dict[str, OpenJob] = {}
        self._events: dict[str, list[Event]] = {}
        self._signals = Signals()
        self._writes = asyncio.Lock()
        self._under_way: set[asyncio.Future[Job]] = set()
        for folder in sorted((root / "jobs").iterdir()):
            self._load(folder)

    async def create(self, change: Change, room: Room = UNBOUNDED) -> Job:
        """See JobStore."""
        return await self._whole(self._create(change, room))

    async def get(self, tenant: str, job_id: str) -> Job:
        """See JobStore."""
        job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise JobNotFound(job_id)
        return job

    async def change(self, tenant: str, job_id: str, plan: Plan, room: Room = UNBOUNDED) -> Job:
        """See JobStore."""
        return await self._whole(self._change(tenant, job_id, plan, room))

    async def jobs(
        self, tenant: str | None, *, limit: int, before: str | None = None, state: State | None = None
    ) -> list[Job]:
        """See JobStore."""
        own = (job for job in self._jobs.values() if tenant in (None, job.tenant) and state in (None, job.state))
        older = (job for job in own if before is None or job.id < before)
        return sorted(older, key=lambda job: job.id, reverse=True)[:limit]

    async def owner(self, job_id: str) -> str:
        """See JobStore."""
        if job_id not in self._jobs:
            raise JobNotFound(job_id)
        return self._jobs[job_id].tenant

    async def open_jobs(self, tenant: str | None = None) -> list[OpenJob]:
        """See JobStore."""
        wanted = (job for job in self._open.values() if tenant in (None, job.tenant))
        return sorted(wanted, key=lambda job: (job.queued_at, job.id))

    async def events(self, tenant: str, job_id: str, after: str | None = None) -> list[Event]:
        """See JobStore."""
        await self.get(tenant, job_id)
        past = int(after) if after is not None and _EVENT_ID.fullmatch(after) else 0
        return [event for event in await self._kept(job_id) if int(event.id) > past]

    def watch(self, job_id: str) -> AbstractContextManager[Watch]:
        """See JobStore."""
        return self._signals.watch(job_id)

    async def delete(self, tenant: str, job_id: str) -> Job:
        """See JobStore."""
        return await self._whole(self._delete(tenant, job_id))

    async def check(self) -> None:
        """See JobStore."""
        if not (self._root / "jobs").is_dir():
            raise JobStoreUnavailable("the folder of the jobs is gone")

    async def close(self) -> None:
        """See JobStore."""
        if self._under_way:
            await asyncio.wait(self._under_way)
        self._lock.release()

    # --- inside ---

    async def _whole(self, change: Coroutine[Any, Any, Job]) -> Job:
        task = asyncio.ensure_future(change)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def _create(self, change: Change, room: Room) -> Job:
        folder = self._root / "jobs" / change.job.id
        async with self._writes:
            self._require_room(change.job, room)
            try:
                await asyncio.to_thread(folder.mkdir)
            except OSError as error:
                raise _unwritable(folder, error) from None
            try:
                await self._write(None, change)
            except BaseException:  # a record that stays would be a job after the next start
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                raise
        return change.job

    async def _change(self, tenant: str, job_id: str, plan: Plan, room: Room) -> Job:
        async with self._writes:
            before = await self.get(tenant, job_id)
            change = plan(before)
            if before.ended and not change.job.ended:
                self._require_room(change.job, room)
            if change.job != before or change.events:
                await self._write(before, change)
            return change.job

    def _require_room(self, job: Job, room: Room) -> None:
        if room.bounded:
            beside = [found.key_id for found in self._open.values() if found.tenant == job.tenant]
            room.check(len(beside), 0 if job.key_id is None else beside.count(job.key_id))

    async def _delete(self, tenant: str, job_id: str) -> Job:
        async with self._writes:
            job = await self.get(tenant, job_id)
            require_deletable(job)
            folder = self._root / "jobs" / job_id
            gone = folder.with_name(f".deleted-{job_id}")
            try:
                await asyncio.to_thread(os.rename, folder, gone)
            except OSError as error:
                raise _unwritable(folder, error) from None
            del self._jobs[job_id]
            self._events.pop(job_id, None)
        self._signals.send(job_id)
        await asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True)
        return job

    def _load(self, folder: Path) -> None:
        if not JOB_ID.fullmatch(folder.name):
            if folder.name.startswith(".deleted-"):
                shutil.rmtree(folder, ignore_errors=True)
            return
        path = folder / "job.json"
        try:
            with Folder.at(folder) as opened:
                opened.sweep(_LEFT)
            document = json.loads(path.read_text())
            job, told = job_from(document["job"]), [Event(**event) for event in document["told"]]
            events = folder / "events.jsonl"
            known = max((int(event.id) for event in _read_events(events, TAIL)), default=0)
            _append(events, [event for event in told if int(event.id) > known])
        except FileNotFoundError:  # it was being made when the process died: nobody was told of it
            shutil.rmtree(folder, ignore_errors=True)
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise JobStoreUnavailable(f"{path}: expected a job's record, got {error}; move its folder away") from None
        self._keep(job)

    def _keep(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._open.pop(job.id, None)
        if not job.ended:
            self._open[job.id] = open_job_of(job)

    async def _kept(self, job_id: str) -> list[Event]:
        """The job's events. Those of a job that has ended are not kept in memory."""
        events = self._events.get(job_id)
        if events is None:
            path = self._root / "jobs" / job_id / "events.jsonl"
            events = await asyncio.to_thread(_read_events, path, MAX_EVENTS * EVENT_BYTES)
            job = self._jobs.get(job_id)
            if job is None:  # deleted meanwhile
                raise JobNotFound(job_id)
            if not job.ended:  # a change made meanwhile knows more events than the file had
                events = self._events.setdefault(job_id, events)
        return events

    async def _write(self, before: Job | None, change: Change) -> None:
        job = change.job
        kept = [] if before is None else await self._kept(job.id)
        last = int(kept[-1].id) if kept else 0
        numbered = [Event(e.name, e.data, str(last + index)) for index, e in enumerate(change.events, 1)]
        folder = self._root / "jobs" / job.id
        state = None if before is None else before.state
        try:
            await asyncio.to_thread(_to_disk, folder, job, numbered, durable=state != job.state)
        except OSError as error:
            raise _unwritable(folder, error) from None
        self._keep(job)
        self._events[job.id] = [*kept, *numbered][-MAX_EVENTS:]
        if job.ended:
            del self._events[job.id]
        self._signals.send(job.id)


def _to_disk(folder: Path, job: Job, events: list[Event], *, durable: bool) -> None:
    """Write the record, which is the change, then its events. Progress alone is not worth a sync."""
    document = {"job": job.as_dict(), "told": [asdict(event) for event in events]}
    write_json(folder / "job.json", document, durable=durable)
    _append(folder / "events.jsonl", events)


def _append(path: Path, events: list[Event]) -> None:
    if not events:
        return
    # Each event begins a new line: a crash may have cut off the last one.
    rest = memoryview("".join("\n" + json.dumps(asdict(event)) for event in events).encode())
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:  # all or none: the change is made again, under the same numbers
            file.truncate(before)
            raise


def _read_events(path: Path, most_bytes: int | None = None) -> list[Event]:
    """The newest MAX_EVENTS events; with ``most_bytes``, of those that begin in the last so many bytes."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        if most_bytes is not None:
            file.seek(max(0, path.stat().st_size - most_bytes))
        lines = file.read().split(b"\n")
    return [event for event in map(_event_from, lines) if event is not None][-MAX_EVENTS:]


def _event_from(line: bytes) -> Event | None:
    with contextlib.suppress(ValueError, TypeError):  # blank, or cut off by the process's death
        return Event(**json.loads(line))
    return None


def _unwritable(folder: Path, error: OSError) -> JobStoreUnavailable:
    return JobStoreUnavailable(f"the record of {folder.name} cannot be written: {error.strerror or error}")
