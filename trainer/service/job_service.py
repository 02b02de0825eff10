"""The API's actions: turns a request's body into a job in the store and the queue.

Owns the checks that a job can be trained, made before it is queued. Knows no HTTP; ``server.web.auth`` decides who may
do what.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from prefixes.errors import Conflict, InvalidParameter
from prefixes.registry.base import Registry
from prefixes.spec import TaskRef, check_name, split_template
from server.parameters import WITHOUT_LIMITS, check_defaults
from server.web.auth import Action, Caller, authorize
from trainer.data.store import DatasetStore
from trainer.evaluation.gate_rule import METRIC_OF, Rule, check_inputs
from trainer.evaluation.scores.presets import check_metrics
from trainer.jobs.base import JobStore, Queue
from trainer.jobs.errors import JobNotFound, JobStoreUnavailable
from trainer.jobs.folders import JobFolders
from trainer.jobs.job import cancelled, new_job, retried
from trainer.jobs.record import Job
from trainer.service.quotas import Quotas
from trainer.service.schemas import MAX_SPEC_BYTES, JobBody
from trainer.service.settings import TrainerSettings
from trainer.service.settling import Settling
from trainer.training.budget import auto_of, check_held_out
from trainer.training.config import PRESETS, RANDOM, TrainConfig, steps_of


@dataclass(frozen=True)
class JobService:
    """The actions of the routes and the parts they use, all of one event loop."""

    settings: TrainerSettings
    store: JobStore
    queue: Queue
    folders: JobFolders
    datasets: DatasetStore
    registry: Registry
    quotas: Quotas
    settling: Settling

    async def submit(self, caller: Caller, body: JobBody) -> Job:
        """Check ``body`` and queue a job.

        Raises what is wrong with it, DatasetNotFound, TaskNotFound, QuotaExceeded, QueueFull.
        """
        spec, steps = await asyncio.to_thread(self._spec, caller, body)
        tenant, key_id = caller.tenant, caller.key_id
        async with self.settling.steps.reserved(tenant, key_id, steps) as reservation:
            change = new_job(tenant, caller.actor, spec, key_id, steps, reservation)
            job = await self.store.create(change, self.quotas.room(tenant, key_id))
        await self._deliver(job)
        return job

    async def find(self, caller: Caller, job_id: str) -> Job:
        """Return a job of the caller's tenant, for an operator of any. Raises JobNotFound."""
        try:
            return await self.store.get(caller.tenant, job_id)
        except JobNotFound:
            if not caller.operates:
                raise
        return await self.store.get(await self.store.owner(job_id), job_id)

    async def cancel(self, caller: Caller, job_id: str) -> Job:
        """See ``job.cancelled``; a running job stops before its next training step."""
        found = await self.find(caller, job_id)
        job = await self.store.change(found.tenant, job_id, cancelled)
        await self.settling.settle(job.tenant, job_id)  # if it waited: a running one is its worker's to end
        return job

    async def retry(self, caller: Caller, job_id: str) -> Job:
        """See ``job.retried``. Raises InvalidParameter for more steps than a day has, QuotaExceeded, QueueFull.

        What the attempt before took is recorded first: raises RegistryUnavailable.
        """
        found = await self.find(caller, job_id)
        retried(found)  # raises JobConflict, before anything is reserved
        await self.settling.usage.record(found)
        left = max(0, found.planned_steps - found.steps)
        async with self.settling.steps.reserved(found.tenant, caller.key_id, left) as reservation:
            again = partial(retried, actor=caller.actor, key_id=caller.key_id, reservation=reservation)
            job = await self.store.change(found.tenant, job_id, again, self.quotas.room(found.tenant, caller.key_id))
        await self._deliver(job)
        return job

    async def delete(self, caller: Caller, job_id: str) -> None:
        """Delete an ended job and its folder. What it published stays, and what it took, which is recorded first.

        Raises RegistryUnavailable where it cannot be.
        """
        found = await self.find(caller, job_id)
        await self.settling.usage.record(found)
        job = await self.store.delete(found.tenant, job_id)
        await asyncio.to_thread(self.folders.remove, job)

    async def delete_dataset(self, tenant: str, dataset: str) -> None:
        """Delete a dataset. Raises Conflict if a queued or running job needs it, DatasetNotFound."""
        for job in await self.store.open_jobs(tenant):
            if dataset in job.datasets:
                raise Conflict(f"dataset {dataset}: expected one that no job needs, {job.id} is {job.state}")
        await asyncio.to_thread(self.datasets.delete, tenant, dataset)

    # --- inside ---

    async def _deliver(self, job: Job) -> None:
        with contextlib.suppress(JobStoreUnavailable):  # the job is stored: ``Worker.reconcile`` will deliver it
            await self.queue.put(job)

    def _spec(self, caller: Caller, body: JobBody) -> tuple[Mapping[str, Any], int]:
        """Return the job's spec, and the most steps that it can take: what is held out or dropped makes them fewer.

        Names that may change their meaning later are resolved now.
        """
        task = TaskRef.parse(body.task, caller.tenant)
        if "@" in body.task:
            raise InvalidParameter("task: expected [tenant/]name; alias has its own field", parameter="task")
        authorize(caller, Action.PUBLISH, task.tenant, task.name)
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
        check_defaults(defaults, {}, WITHOUT_LIMITS)
        lines = self.datasets.info(caller.tenant, body.dataset).lines
        if body.validation_dataset is not None:
            self.datasets.info(caller.tenant, body.validation_dataset)
        if body.evaluation is not None:
            check_metrics(body.evaluation.preset, body.evaluation.metrics)
        config = TrainConfig.of(preset, body.hyperparameters.given(), from_text=body.start_text is not None)
        if (body.start_from, body.start_text) != (None, None) and config.init != RANDOM:
            raise InvalidParameter(
                "init: expected words or examples, or something to start from, got both", parameter="init"
            )
        if None not in (body.start_from, body.start_text):
            raise InvalidParameter(
                "start_text: expected a text or a version to start from, got both", parameter="start_text"
            )
        auto = auto_of(body.auto, body.budget_minutes, body.hyperparameters.given())
        if body.validation_dataset is None:
            check_held_out(body.hold_out, config, auto)
        spec = {
            "task": task.task,
            "dataset": body.dataset,
            "validation_dataset": body.validation_dataset,
            "hold_out": body.hold_out,
            "backbone": backbone,
            "preset": preset,
            "config": config.as_dict(),
            "auto": None if auto is None else auto.as_dict(),
            "template": body.template,
            "defaults": defaults,
            "truncate": body.truncate,
            "drop_long": body.drop_long,
            "alias": body.alias,
            "start_from": self._start(caller, body.start_from),
            "start_text": body.start_text,
            "evaluation": None if body.evaluation is None else body.evaluation.model_dump(mode="json"),
            **self._gate(caller, body),
        }
        check_size(spec)
        return spec, steps_of(config, lines) if auto is None else auto.most_steps

    def _gate(self, caller: Caller, body: JobBody) -> dict[str, Any]:
        """The gate's fields. Without a rule a share may be held out all the same, for the gate of a later version."""
        check_inputs(body.promote_if is not None, body.gate_dataset is not None, body.gate_hold_out)
        if body.gate_dataset is not None:
            self.datasets.info(caller.tenant, body.gate_dataset)
        inputs = {"gate_dataset": body.gate_dataset, "gate_hold_out": body.gate_hold_out}
        if body.promote_if is None:
            return {"promote_if": None, **inputs}
        if body.alias is None:
            raise InvalidParameter("promote_if: expected an alias that may move, got null", parameter="promote_if")
        rule = Rule(body.promote_if.metric, body.promote_if.margin)
        preset = body.promote_if.preset or ("plain" if body.evaluation is None else body.evaluation.preset)
        check_metrics(preset, (METRIC_OF[rule.metric],))
        return {"promote_if": {"metric": rule.metric, "margin": rule.margin, "preset": preset}, **inputs}

    def _start(self, caller: Caller, text: str | None) -> str | None:
        """Resolve the reference of a warm start to a version."""
        if text is None:
            return None
        ref = TaskRef.parse(text, caller.tenant)
        authorize(caller, Action.DOWNLOAD, ref.tenant, ref.name)
        return f"{ref.task}@{self.registry.resolve(ref).version}"


def check_size(spec: Mapping[str, Any]) -> None:
    """Raise InvalidParameter if ``spec`` is too large for a record; its largest field is named."""
    sizes = {name: len(json.dumps(value, ensure_ascii=False).encode()) for name, value in spec.items()}
    size, largest = sum(sizes.values()), max(sizes, key=lambda name: sizes[name])
    if size > MAX_SPEC_BYTES:
        raise InvalidParameter(
            f"job: expected at most {MAX_SPEC_BYTES} bytes of JSON in template, defaults, hyperparameters and texts "
            f"together, got {size}, {sizes[largest]} of them in {largest}",
            parameter=largest, expected=MAX_SPEC_BYTES, got=size,
        )  # fmt: skip
