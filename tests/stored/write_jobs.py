"""One story of jobs and datasets, told to 3b858cc's stores: see ``write.py``, which runs it.

Owns what the jobs are and what became of them; knows not where they are stored.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from write_registry import VERSIONS

from trainer.datasets import DatasetStore
from trainer.jobs.base import JobStore, Queue
from trainer.jobs.folders import JobFolders
from trainer.jobs.job import cancelled, claimed, failed, lost, new_job, progressed, retried, sealed, stopped, succeeded
from trainer.jobs.record import Failure, Job


@asynccontextmanager
async def told_jobs(store: JobStore, queue: Queue, root: Path) -> AsyncIterator[dict[str, str]]:
    """A job in every state, three of them with a worker that is at work within the block; ids by what they are."""
    folders, dataset = JobFolders(root), upload(root)
    held = asyncio.Event()
    progress = {"step": 30, "total": 100, "loss": 1.25, "tokens": 960}
    result = {"task": "acme/e2e", "version": VERSIONS[0], "alias": "production", "scores": {"bleu": 68.2}}
    scripts: dict[str, list[Callable[[Job, int], Any]]] = {
        "succeeded": [
            lambda job, token: sealed(job, token, result["version"]),
            lambda job, token: succeeded(job, token, result),
        ],
        "failed": [lambda job, token: failed(job, token, Failure("invalid_data", "line 3: expected a target"))],
        "stopped": [lambda job, token: cancelled(job), stopped],
        "retried": [lambda job, token: failed(job, token, Failure("crashed", "it did"))],
        "running": [],
        "cancelling": [lambda job, token: cancelled(job)],
        "sealed": [lambda job, token: sealed(job, token, VERSIONS[1])],
    }
    names: dict[str, str] = {}
    holding: list[str] = []

    async def take(tenant: str, job_id: str, token: int) -> None:
        job = await store.change(tenant, job_id, lambda job: claimed(job, token, "worker-1"))
        leave_notes(folders, job)
        name = next(name for name, found in names.items() if found == job_id)
        moves = [lambda job, token: progressed(job, token, progress, "training"), *scripts[name]]
        for move in moves:
            job = await store.change(tenant, job_id, lambda job, move=move: move(job, token))
        if not job.ended:
            holding.append(name)
            await held.wait()

    work = asyncio.create_task(queue.work(take, 3))
    for name in [*scripts, "queued", "cancelled", "foreign"]:
        await asyncio.sleep(0.01)  # ids grow with the clock, in milliseconds
        spec = {
            "task": "acme/e2e",
            "alias": "production",
            "dataset": dataset,
            "config": {"seed": 1, "prefix_length": 2},
        }
        tenant = "default" if name == "foreign" else "acme"
        job = await store.create(new_job(tenant, f"tenant:{tenant}", spec))
        names[name] = job.id
        if name == "cancelled":
            await store.change(tenant, job.id, cancelled)
            continue
        if name == "queued":  # by a worker that was lost before, and has been found to be
            leave_notes(folders, await store.change(tenant, job.id, lambda job: claimed(job, 1, "worker-0")))
            job = await store.change(tenant, job.id, lambda job: lost(job, 1))
        await queue.put(job)
    while len(holding) < 3:
        await asyncio.sleep(0.05)
    await queue.put(await store.change("acme", names["retried"], retried))
    yield names
    work.cancel()
    await asyncio.wait({work})


def leave_notes(folders: JobFolders, job: Job) -> None:
    (folders.enter(job) / "notes.txt").write_text(f"by delivery {job.token}\n")


async def jobs_as_read(store: JobStore, root: Path, names: dict[str, str]) -> dict[str, Any]:
    jobs = {tenant: await store.jobs(tenant, limit=100) for tenant in ("acme", "default")}
    return {
        "names": names,
        "jobs": {tenant: [job.as_dict() for job in found] for tenant, found in jobs.items()},
        "open": [job.id for job in await store.open_jobs()],
        "events": {
            job.id: [asdict(event) for event in await store.events(tenant, job.id)]
            for tenant, found in jobs.items()
            for job in found
        },
        "datasets": [asdict(info) for info in DatasetStore(root).list("acme")],
    }


def upload(root: Path) -> str:
    """A dataset, and an upload that was cut short."""
    lines = [json.dumps({"input": f"name : Blue Spice {n}", "target": "A coffee shop, é."}) + "\n" for n in range(3)]
    store = DatasetStore(root)
    with store.begin("acme", max_bytes=10_000, name="reviews") as begun:
        begun.write("".join(lines).encode())
        info = begun.finish()
    child = os.fork()
    if not child:
        store.begin("acme", max_bytes=10_000).write(lines[0].encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return info.digest
