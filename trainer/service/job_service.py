"""What the API does: from a request's body to a job in the store and the queue.

Owns the checks that a job can be trained at all, made before anybody waits for it; knows no HTTP. Who may do what is
``server.web.auth``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixes.errors import Conflict, InvalidParameter, QueueFull
from prefixes.parameters import check_decoding_parameters
from prefixes.registry.base import Registry
from prefixes.spec import TaskRef, check_name, split_template
from server.web.auth import Action, Caller, authorize
from trainer.data.store import DatasetStore
from trainer.evaluation.scores.presets import check_metrics
from trainer.jobs.base import JobStore, Queue
from trainer.jobs.errors import JobStoreUnavailable
from trainer.jobs.folders import JobFolders
from trainer.jobs.job import Job, cancelled, new_job, retried
from trainer.service.schemas import JobBody
from trainer.service.settings import TrainerSettings
from trainer.training.config import PRESETS, TrainConfig


@dataclass(frozen=True)
class JobService:
    """Everything the routes need; all of it belongs to one event loop."""

    settings: TrainerSettings
    store: JobStore
    queue: Queue
    folders: JobFolders
    datasets: DatasetStore
    registry: Registry

    async def submit(self, caller: Caller, body: JobBody) -> Job:
        """A queued job. Raises what is wrong with ``body``, DatasetNotFound, TaskNotFound, QueueFull."""
        spec = await asyncio.to_thread(self._spec, caller, body)
        open_jobs = [job for job in await self.store.open_jobs() if job.tenant == caller.tenant]
        most = self.settings.max_open_jobs
        if len(open_jobs) >= most:
            raise QueueFull(f"jobs: expected at most {most} queued and running, got {len(open_jobs)}", expected=most)
        job = await self.store.create(new_job(caller.tenant, caller.actor, spec))
        await self._deliver(job)
        return job

    async def cancel(self, caller: Caller, job_id: str) -> Job:
        """See ``job.cancelled``; a running job stops before its next training step."""
        return await self.store.change(caller.tenant, job_id, cancelled)

    async def retry(self, caller: Caller, job_id: str) -> Job:
        """See ``job.retried``."""
        job = await self.store.change(caller.tenant, job_id, retried)
        await self._deliver(job)
        return job

    async def delete(self, caller: Caller, job_id: str) -> None:
        """Forget a job that has ended, and its folder. What it published stays."""
        job = await self.store.delete(caller.tenant, job_id)
        await asyncio.to_thread(self.folders.remove, job)

    async def delete_dataset(self, caller: Caller, dataset: str) -> None:
        """Remove a dataset. Raises Conflict for one that a queued or running job needs, DatasetNotFound."""
        for job in await self.store.open_jobs():
            if job.tenant == caller.tenant and dataset in (job.spec["dataset"], job.spec["validation_dataset"]):
                raise Conflict(f"dataset {dataset}: expected one that no job needs, {job.id} is {job.state}")
        await asyncio.to_thread(self.datasets.delete, caller.tenant, dataset)

    # --- inside ---

    async def _deliver(self, job: Job) -> None:
        with contextlib.suppress(JobStoreUnavailable):  # it is kept: whoever looks after the queue finds it
            await self.queue.put(job)

    def _spec(self, caller: Caller, body: JobBody) -> Mapping[str, Any]:
        """What the worker will do, with everything resolved that may mean something else tomorrow."""
        task = TaskRef.parse(body.task, caller.tenant)
        if "@" in body.task:
            raise InvalidParameter("task: expected [tenant/]name; alias has its own field", parameter="task")
        authorize(caller, Action.PUBLISH, task.tenant)
        if body.alias is not None:
            check_name("alias", body.alias)
        backbone = body.backbone or next(iter(self.settings.backbones))
        if backbone not in self.settings.backbones:
            names = ", ".join(self.settings.backbones)
            raise InvalidParameter(f"backbone: expected one of {names}, got {backbone!r}", parameter="backbone")
        preset = body.preset or (task.name if task.name in PRESETS else "e2e")
        if preset not in PRESETS:
            raise InvalidParameter(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}", parameter="preset")
        if body.template is not None:
            split_template(body.template)
        defaults = {**PRESETS[preset].decoding, **body.defaults}
        check_decoding_parameters(defaults)
        for digest in filter(None, (body.dataset, body.validation_dataset)):
            self.datasets.info(caller.tenant, digest)
        if body.evaluation is not None:
            check_metrics(body.evaluation.preset, body.evaluation.metrics)
        config = TrainConfig.of(preset, body.hyperparameters.given(), from_text=body.start_text is not None)
        if (body.start_from, body.start_text) != (None, None) and config.init != "random":
            raise InvalidParameter("init: expected words, or something to start from, got both", parameter="init")
        if None not in (body.start_from, body.start_text):
            raise InvalidParameter(
                "start_text: expected a text or a version to start from, got both", parameter="start_text"
            )
        return {
            "task": task.task,
            "dataset": body.dataset,
            "validation_dataset": body.validation_dataset,
            "hold_out": body.hold_out,
            "backbone": backbone,
            "preset": preset,
            "config": config.as_dict(),
            "template": body.template,
            "defaults": defaults,
            "truncate": body.truncate,
            "drop_long": body.drop_long,
            "alias": body.alias,
            "start_from": self._start(caller, body.start_from),
            "start_text": body.start_text,
            "evaluation": None if body.evaluation is None else body.evaluation.model_dump(mode="json"),
        }

    def _start(self, caller: Caller, text: str | None) -> str | None:
        """The version that a warm start means now."""
        if text is None:
            return None
        ref = TaskRef.parse(text, caller.tenant)
        authorize(caller, Action.READ, ref.tenant)
        return f"{ref.task}@{self.registry.resolve(ref).version}"
