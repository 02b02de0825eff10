"""Puts a trainer together: registry, job store, queue, worker.

Owns the choice between Redis and the folder, and the checks before the service starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from dataclasses import dataclass

import anyio
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, disable_created_metrics

from prefixes.errors import RegistryUnavailable
from prefixes.registry import open_to_serve
from prefixes.registry.limiter import open_limiter
from prefixes.registry.redis.url import parse_redis_url
from prefixes.tenancy.keyring import Keyring
from server.web.binding import addresses_of
from server.web.denials import DenialLog
from server.web.opening import open_keyring
from server.web.settings_sources import InvalidSettings
from server.web.upload_places import UploadPlaces
from trainer.data.store import DatasetStore
from trainer.jobs.base import JobStore, Queue
from trainer.jobs.disk_store import DiskJobStore
from trainer.jobs.folders import JobFolders
from trainer.jobs.local_queue import LocalQueue
from trainer.jobs.redis_store import RedisJobStore
from trainer.jobs.saq_queue import PATIENCE, SaqQueue
from trainer.service import landlock
from trainer.service.job_service import JobService
from trainer.service.metrics import JobMetrics, QueueCollector
from trainer.service.quotas import Quotas
from trainer.service.runtime import MAX_WRITES_AT_ONCE, TrainerRuntime
from trainer.service.settings import TrainerSettings
from trainer.service.settling import Settling
from trainer.service.steps import StepReservations
from trainer.service.usage import JobUsage
from trainer.service.worker import Worker

_log = logging.getLogger("prefixd.trainer")


@dataclass(frozen=True)
class AssembledTrainer:
    """The parts of one process. They belong to the event loop that they were assembled on."""

    runtime: TrainerRuntime
    worker: Worker
    waiting: QueueCollector

    async def close(self) -> None:
        """Release connections and locks."""
        await asyncio.to_thread(self.runtime.denials.close)
        await asyncio.to_thread(self.runtime.keyring.close)
        await self.worker.settling.steps.close()
        await self.worker.queue.close()
        await self.worker.store.close()
        self.worker.registry.close()


async def assemble(settings: TrainerSettings) -> AssembledTrainer:
    """Connect to registry, job store and queue. Raises InvalidSettings, RegistryUnavailable, JobStoreUnavailable."""
    if settings.redis is None and not settings.api:
        raise InvalidSettings("api: without --redis one process is the whole service; expected no --no-api")
    if not (settings.api or settings.workers):
        raise InvalidSettings("workers: expected at least 1 in a process without the API, got 0")
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    registry = open_to_serve(settings.registry, registry_id=settings.registry_id)
    hosts = (*addresses_of(settings.admin_host), *((settings.host,) if settings.api else ()))
    try:
        keyring = open_keyring(registry.tenancy, settings, hosts)
        store, queue = await _jobs(settings, name, keyring)
    except BaseException:
        registry.close()
        raise
    disable_created_metrics()
    metrics, waiting = CollectorRegistry(), QueueCollector()
    for collector in (ProcessCollector(registry=None), PlatformCollector(registry=None), waiting):
        metrics.register(collector)
    folders = JobFolders(settings.data)
    limiter = open_limiter(settings.registry, registry.usage, service="trainer")
    settling = Settling(store, queue, StepReservations(limiter, keyring), JobUsage(registry.usage))
    service = JobService(
        settings, store, queue, folders, DatasetStore(settings.data), registry, Quotas(settings, keyring), settling
    )
    places = UploadPlaces(settings.max_uploads, settings.max_uploads_of_a_tenant, settings.body_timeout_s)
    writes = anyio.CapacityLimiter(MAX_WRITES_AT_ONCE)
    denials = DenialLog(registry.tenancy)
    runtime = TrainerRuntime(settings, service, keyring, denials, metrics, places, writes)
    worker = Worker(name, settings, store, queue, folders, registry, keyring, JobMetrics(metrics), settling, denials)
    keyring.start()
    denials.start()
    if settings.workers:
        _say_if_unconfined(settings)
    _log.info("assembled", extra={"facts": {"worker": name, "registry_id": registry.id, "redis": bool(settings.redis)}})
    return AssembledTrainer(runtime, worker, waiting)


def _say_if_unconfined(settings: TrainerSettings) -> None:
    if settings.confine_jobs and landlock.version():
        return
    reason = "the kernel has no Landlock, or refuses it" if settings.confine_jobs else "--no-confine-jobs"
    _log.warning("jobs' processes can read what the trainer's user can", extra={"facts": {"reason": reason}})


async def _jobs(settings: TrainerSettings, worker: str, keyring: Keyring) -> tuple[JobStore, Queue]:
    if settings.redis is None:
        return DiskJobStore(settings.data), LocalQueue(settings.data / "turns.json", keyring.weight_of)
    try:
        target = parse_redis_url(settings.redis)
    except RegistryUnavailable as error:
        raise InvalidSettings(f"redis: {error.message}") from None
    if target.kind == "cluster":
        raise InvalidSettings("redis: expected one server or Sentinels for the jobs, got a Cluster")
    store = RedisJobStore(target.connect_asyncio())
    try:
        await store.check()
        client = target.connect_asyncio(patience=PATIENCE)
        stop_s = settings.drain_timeout_s
        return store, SaqQueue(client, worker, keyring.weight_of, lease_s=settings.lease_s, stop_s=stop_s)
    except BaseException:
        await store.close()
        raise
