"""Publishes what a job has made: once, and with the alias only where the job's gate says so.

Owns a job's result. Asks for the job's rights just before. Knows no queue and retries nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixes.errors import Conflict
from prefixes.registry.base import Registry
from prefixes.spec import TaskRef
from prefixes.tenancy.keyring import Keyring
from trainer.jobs.record import Job
from trainer.service.rights import check_rights
from trainer.training.publish import placed, raise_if_moved


def publish(
    job: Job, artifact: bytes, record: Mapping[str, Any], registry: Registry, keyring: Keyring
) -> dict[str, Any]:
    """Publish under the job's key, whose repetition changes nothing; return the job's result.

    A gate's verdict goes into the audit, and with the move of the alias into the version's record: a repetition finds
    there what was decided. Raises Forbidden, TaskNotFound, RegistryUnavailable and the registry's refusals, and
    AliasMoved where the alias points at another version than the gate compared with.
    """
    task, wanted = TaskRef.parse(job.spec["task"]), job.spec["alias"]
    check_rights(keyring, job, task)
    try:
        info = registry.publish(
            task.tenant,
            task.name,
            artifact,
            **placed(record.get("gate"), wanted),
            record={**record, "job": job.id},
            actor=job.actor,
            idempotency_key=job.id,
            quota=keyring.registry_quota(task.tenant, job.key_id),
        )
    except Conflict as error:
        raise_if_moved(error, record)
        raise
    told = {name: record[name] for name in ("search", "warnings") if record.get(name)}
    scores = record.get("scores", {})
    result = {"task": task.task, "version": info.version, "alias": wanted, "scores": scores, **told}
    if "gate" not in record:
        return result
    gate = info.record["gate"]
    return result | {"gate": gate, "alias": wanted if gate["verdict"] == "promoted" else None}
