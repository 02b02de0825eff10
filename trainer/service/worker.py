"""A worker: takes deliveries, starts a process that trains each, and publishes the result.

Owns a job's life between claim and end on this machine. Only the worker has the registry; the training process gets a
folder. Every write goes through the fence: the record's token, the folder's name, the publish key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from prefixes.errors import PrefixdError, RegistryUnavailable
from prefixes.registry.base import Registry
from prefixes.spec import TaskRef
from prefixes.tenancy.keyring import Keyring
from server.web.denials import DenialLog, begin_notes
from trainer.jobs.base import JobStore, Plan, Queue
from trainer.jobs.errors import Fenced, JobNotFound, JobStoreUnavailable
from trainer.jobs.folders import JobFolders
from trainer.jobs.job import claimed, failed, handed_back, lost, require_owner, stopped, succeeded, trained
from trainer.jobs.lease import Lease
from trainer.jobs.open_job import OpenJob
from trainer.jobs.record import Change, Job
from trainer.jobs.signals import Watch
from trainer.service.current import note_moved
from trainer.service.guard import STOP_S, Guard
from trainer.service.metrics import JobMetrics
from trainer.service.outcome import Cancelled, JobFailed, failure_of
from trainer.service.process import ChildProcess, started
from trainer.service.progress_writer import ProgressWriter
from trainer.service.publishing import publish
from trainer.service.registry_retry import RETRY_S, RegistryRetry
from trainer.service.request import START, finished, prepare
from trainer.service.rights import audit, check_rights, check_start
from trainer.service.settings import TrainerSettings
from trainer.service.settling import Settling
from trainer.training.publish import AliasMoved

HAND_BACK_S: Final = 2.0
"""The part of the drain time that is kept for handing jobs back."""

LOST: Final = "job lost to another worker"

_log = logging.getLogger("prefixd.trainer")


@dataclass(frozen=True)
class Worker:
    """``handle`` runs one delivery. ``name`` is unique to this process."""

    name: str
    settings: TrainerSettings
    store: JobStore
    queue: Queue
    folders: JobFolders
    registry: Registry
    keyring: Keyring
    metrics: JobMetrics
    settling: Settling
    denials: DenialLog

    async def handle(self, tenant: str, job_id: str, token: int) -> None:
        """See base.Handler. When cancelled, it first hands the job back."""
        try:
            job = await self.store.change(tenant, job_id, lambda job: claimed(job, token, self.name))
        except (Fenced, JobNotFound):  # the delivery was replaced, or the job has ended, or was deleted
            await self.settling.settle(tenant, job_id)
            return
        except asyncio.CancelledError:  # the claim may have succeeded
            await asyncio.shield(self._hand_back(tenant, job_id, token))
            raise
        self._tell("job claimed", job)
        notes = begin_notes()
        try:
            await self._run(job)
        except Fenced:
            self._tell(LOST, job)
        except Cancelled:
            await self._end(job, lambda job: stopped(job, token))
        except asyncio.CancelledError:
            await asyncio.shield(self._hand_back(tenant, job_id, token))
            raise
        except Exception as error:
            if not isinstance(error, JobFailed | PrefixdError):
                _log.exception("job failed", extra={"facts": {"job": job.id}})
            failure = failure_of(error, self.settings)
            if await self._end(job, lambda job: failed(job, token, failure)):
                audit(self.denials, job, notes)
        finally:
            self.metrics.forget(job.id)

    async def reconcile(self) -> list[OpenJob]:
        """Deliver lost jobs again, and settle those that ended elsewhere. Return all open jobs as they were before."""
        found = await self.store.open_jobs()
        await self.settling.settle_ended(found)
        again: list[Job] = []
        for suspect in await self.queue.dead(found):
            with contextlib.suppress(Fenced, JobNotFound):  # the job has changed meanwhile
                job = await self.store.get(suspect.tenant, suspect.id)
                if job.token != suspect.token and not await self.queue.dead([job]):
                    continue
                if job.state == "running":
                    job = await self.store.change(job.tenant, job.id, lambda found, t=job.token: lost(found, t))  # type: ignore[misc]
                    self._tell("worker lost", job)
                    if job.ended:
                        self.metrics.ended(job)
                if job.state == "queued":
                    again.append(job)
        for job in again:  # all at once, so that tenants take turns from the first on
            await self.queue.put(job)
        return found

    # --- inside ---

    async def _run(self, job: Job) -> None:
        token = job.token
        folder = await asyncio.to_thread(self.folders.enter, job)
        await self._require_kept(job)
        with self.store.watch(job.id) as watch:
            heartbeats = asyncio.create_task(self._send_heartbeats(job))
            try:
                result = None
                while result is None:
                    await self._prepare(job, folder, watch)
                    version = await self._train(job, folder, watch)
                    job = await self._write(job, partial(trained, token=token, version=version))
                    if job.ended:
                        raise Cancelled
                    try:
                        result = await self._publish(job, folder, watch)
                    except AliasMoved:  # the gate alone is done again, and no more often than ``current`` allows
                        await asyncio.to_thread(note_moved, folder)
                await self._end(job, lambda job: succeeded(job, token, result))
            finally:
                heartbeats.cancel()

    async def _prepare(self, job: Job, folder: Path, watch: Watch) -> None:
        with contextlib.suppress(RegistryUnavailable):  # judged again before it publishes: training need not wait
            await asyncio.to_thread(check_rights, self.keyring, job, TaskRef.parse(job.spec["task"]))
        retry = self._registry_retry(job, watch)
        while True:
            try:
                if not (folder / START).exists():
                    await asyncio.to_thread(check_start, self.keyring, job)
                return await asyncio.to_thread(prepare, job, folder, self.settings, self.registry)
            except RegistryUnavailable as error:
                await retry.wait(error)

    async def _train(self, job: Job, folder: Path, watch: Watch) -> str:
        """Train in a child process and return the version. Raises Fenced, Cancelled, JobFailed."""
        limits = self.settings.threads, self.settings.max_job_memory
        async with started(folder, *limits, confined=self.settings.confine_jobs) as child:
            progress = ProgressWriter(job, self.store, self.metrics, self.settings.progress_s)
            receiving = asyncio.create_task(self._receive(child, progress))
            guard = Guard(job, child, watch, lambda: self._owned(job), self.settings)
            guarding = asyncio.create_task(guard.run())
            writing = asyncio.create_task(progress.run())
            try:
                await asyncio.wait({receiving, guarding}, return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done():
                    await guarding  # raises Fenced, or why the process, which did not stop, was asked to
                last = await receiving
                code = await child.ended(STOP_S)
            except asyncio.CancelledError:  # this worker ends: the process gets time to write a checkpoint
                child.stop()
                await child.ended(max(1.0, self.settings.drain_timeout_s - HAND_BACK_S))
                raise
            finally:
                for task in (receiving, guarding, writing):
                    task.cancel()
                await asyncio.gather(receiving, guarding, writing, return_exceptions=True)
        await progress.flush()
        return guard.version_of(last, code)

    async def _receive(self, child: ChildProcess, progress: ProgressWriter) -> Mapping[str, Any]:
        """Pass on progress until the process ends. Return its ``done`` or ``failed`` message, empty without one."""
        last: Mapping[str, Any] = {}
        async for message in child.messages():
            if message.get("event") in ("done", "failed"):
                last = message
            elif message.get("event") in ("stage", "progress"):
                progress.receive(message)
        return last

    async def _owned(self, job: Job) -> Job:
        """Return the record if this worker still has this delivery. Raises Fenced."""
        try:
            found = await self.store.get(job.tenant, job.id)
        except JobNotFound:
            raise Fenced(job.id, job.token, 0, "deleted") from None
        self._require_own(found, job.token)
        return found

    def _require_own(self, found: Job, token: int) -> None:
        """Raise Fenced if another worker has the job. It may have the same token: a Redis can lose the last claim."""
        if found.worker != self.name:
            raise Fenced(found.id, token, found.token, found.state)
        require_owner(found, token)

    async def _require_kept(self, job: Job) -> None:
        """Raise Fenced if the job was deleted before its folder was entered; remove the new, empty folder."""
        with contextlib.suppress(JobStoreUnavailable):
            try:
                await self.store.get(job.tenant, job.id)
            except JobNotFound:
                await asyncio.to_thread(self.folders.remove_empty, job)
                raise Fenced(job.id, job.token, 0, "deleted") from None

    async def _send_heartbeats(self, job: Job) -> None:
        while True:
            with contextlib.suppress(JobStoreUnavailable):
                await self.queue.heartbeat(job)
            await asyncio.sleep(Lease(self.settings.lease_s).heartbeat_s)

    async def _publish(self, job: Job, folder: Path, watch: Watch) -> dict[str, Any]:
        """Publish once; wait for a registry that is away. Return the job's result. Raises AliasMoved."""
        artifact, record = await asyncio.to_thread(finished, folder)
        retry = self._registry_retry(job, watch)
        while True:
            with contextlib.suppress(JobStoreUnavailable):  # the idempotency key prevents a second publish
                await self._owned(job)  # this worker may have slept while the job ended or began again
            try:
                return await asyncio.to_thread(publish, job, artifact, record, self.registry, self.keyring)
            except RegistryUnavailable as error:
                await retry.wait(error)

    def _registry_retry(self, job: Job, watch: Watch) -> RegistryRetry:
        return RegistryRetry(self.settings.publish_patience_s, lambda: self._owned(job), watch)

    async def _write(self, job: Job, plan: Plan) -> Job:
        """Apply a change that must not be lost: wait for a store that is away. Raises Fenced."""

        def own(found: Job) -> Change:
            if found.worker != self.name:
                raise Fenced(job.id, job.token, found.token, found.state)
            return plan(found)

        told = False
        while True:
            try:
                return await self.store.change(job.tenant, job.id, own)
            except JobNotFound:
                raise Fenced(job.id, job.token, 0, "deleted") from None
            except JobStoreUnavailable as error:
                if not told:
                    facts = {"job": job.id, "tenant": job.tenant, "reason": error.message}
                    _log.warning("a job's record cannot be written yet", extra={"facts": facts})
                told = True
                await asyncio.sleep(RETRY_S)

    async def _end(self, job: Job, plan: Plan) -> bool:
        """Apply the last change of a delivery. False if another worker has the job."""
        try:
            ended = await self._write(job, plan)
        except Fenced:
            self._tell(LOST, job)
            return False
        await self.settling.settle(ended.tenant, ended.id)
        self.metrics.ended(ended)
        self._tell("job ended", ended, state=ended.state, code=ended.failure.code if ended.failure else None)
        return True

    async def _hand_back(self, tenant: str, job_id: str, token: int) -> None:
        def plan(found: Job) -> Change:
            self._require_own(found, token)
            return handed_back(found, token)

        with contextlib.suppress(Fenced, JobNotFound, JobStoreUnavailable):  # otherwise ``reconcile`` finds the job
            back = await self.store.change(tenant, job_id, plan)
            self._tell("job handed back", back)
            if back.state == "queued":
                await self.queue.put(back)

    def _tell(self, message: str, job: Job, **facts: Any) -> None:
        told = {"job": job.id, "tenant": job.tenant, "token": job.token, "worker": self.name, **facts}
        _log.info(message, extra={"facts": told})
