"""A training job: its five states, and each move between them as a pure function.

    queued     waits for a worker
    running    a worker has it; the token in the record is that worker's
    succeeded  trained and published
    failed     ended by an error, which the record names
    cancelled  ended because its owner asked

    queued -> running                    claimed
    queued -> cancelled                  cancel
    running -> succeeded, failed         by its worker
    running -> cancelled                 by its worker, within a training step of the cancel
    running -> queued                    its worker shut down, or was lost and is replaced
    running -> failed, cancelled         its worker was lost once too often, or with a cancel pending
    failed, cancelled -> queued          retry

A job is trained once its record has a version. It may already be published; only the registry knows, by the job's
idempotency key. A cancel is then too late, and another worker finishes the job if this one is lost.

Owns these rules; knows no store, no queue and no process. The ``token`` is the fence: every delivery to a worker raises
it, and a change under an older token is refused.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from trainer.jobs.clock import now, seconds_since
from trainer.jobs.errors import Fenced, JobConflict
from trainer.jobs.record import Change, Event, Failure, Job, State

MAX_LOST: Final = 3
"""A job fails when it has lost this many workers in one attempt: then the job itself kills them."""
MAX_LOST_TRAINED: Final = 10
"""The same for a trained job. It is higher because the job may already be published; a retry finds what was."""


def new_job(
    tenant: str,
    actor: str,
    spec: Mapping[str, Any],
    key_id: str | None = None,
    planned_steps: int = 0,
    reservation: str | None = None,
) -> Change:
    """Create a queued job. Ids sort by time and cannot be guessed."""
    made = now()
    job = Job(
        id=f"job-{int(time.time() * 1000):012x}-{secrets.token_hex(8)}",
        tenant=tenant,
        actor=actor,
        spec=dict(spec),
        state="queued",
        token=1,
        attempt=1,
        created_at=made,
        queued_at=made,
        key_id=key_id,
        planned_steps=planned_steps,
        reservation=reservation,
    )
    return _told(job)


# --- what its owner asks for ---


def cancelled(job: Job) -> Change:
    """Cancel a queued job at once; ask a running one to stop. A trained job goes on, and a second cancel does nothing.

    Raises JobConflict for a job that has ended.
    """
    if job.state == "cancelled" or job.cancel_requested:
        return Change(job)
    if job.state == "queued" and job.version is None:
        return _ended(job, "cancelled")
    if not job.ended:
        return _told(replace(job, cancel_requested=True))
    raise JobConflict(f"cancel: expected a queued or running job, got one that {job.state}", state=job.state)


def retried(
    job: Job, actor: str | None = None, key_id: str | None = None, reservation: str | None = None
) -> Change:
    """Queue the job again, now in the name of ``actor`` if one is given; it resumes from its last checkpoint.

    Raises JobConflict unless it failed or was cancelled.
    """
    if job.state not in ("failed", "cancelled"):
        raise JobConflict(f"retry: expected a failed or cancelled job, got one that is {job.state}", state=job.state)
    fresh = replace(
        job, attempt=job.attempt + 1, lost=0, cancel_requested=False, failure=None, finished_at=None, version=None,
        steps_before=job.steps, tokens_before=job.tokens, reservation=reservation,
    )  # fmt: skip
    if actor is not None:
        fresh = replace(fresh, actor=actor, key_id=key_id)
    return _queued(fresh)


def require_deletable(job: Job) -> None:
    """Raise JobConflict unless ``job`` has ended."""
    if not job.ended:
        raise JobConflict(f"delete: expected a job that has ended, got one that is {job.state}", state=job.state)


# --- what its worker reports ---


def claimed(job: Job, token: int, worker: str) -> Change:
    """Give the job to ``worker``. Raises Fenced if the delivery is not the newest or the job is no longer queued."""
    if (job.token, job.state, job.worker) == (token, "running", worker):
        return Change(job)  # a repeated claim: the first answer was lost
    if job.token != token or job.state != "queued":
        raise Fenced(job.id, token, job.token, job.state)
    return _told(
        replace(
            job, state="running", worker=worker, started_at=job.started_at or now(), claimed_at=now(), stage="loading",
            progress={},
        )
    )  # fmt: skip


def progressed(
    job: Job, token: int, progress: Mapping[str, Any], stage: str, step: int = 0, tokens: int = 0
) -> Change:
    """Record progress and stage, and ``step`` and ``tokens`` if no worker had more. Raises Fenced for an old token."""
    require_owner(job, token)
    steps, tokens = max(job.steps, step), max(job.tokens, tokens)
    changed = replace(job, progress=dict(progress), stage=stage, steps=steps, tokens=tokens)
    events = [_state_event(changed)] if stage != job.stage else []
    if progress != job.progress:
        events.append(Event("progress", {"stage": stage, **progress}))
    return Change(changed, tuple(events))


def trained(job: Job, token: int, version: str) -> Change:
    """Record the finished ``version``, which is published next. A requested cancel ends the job instead.

    Raises Fenced for an old token.
    """
    if job.token == token and job.state == "cancelled":
        return Change(job)
    require_owner(job, token)
    if job.to_be_cancelled:
        return _ended(job, "cancelled")
    return _told(replace(job, version=version, stage="publishing"))


def succeeded(job: Job, token: int, result: Mapping[str, Any]) -> Change:
    """End the job with ``result``. Raises Fenced for an old token."""
    if (job.token, job.state) == (token, "succeeded"):
        return Change(job)
    require_owner(job, token)
    return _ended(replace(job, result=dict(result)), "succeeded")


def failed(job: Job, token: int, failure: Failure) -> Change:
    """End the job with ``failure``, or as cancelled if a cancel was requested. Raises Fenced for an old token."""
    if job.token == token and job.ended:
        return Change(job)
    require_owner(job, token)
    if job.to_be_cancelled:
        return _ended(job, "cancelled")
    return _ended(replace(job, failure=failure), "failed")


def stopped(job: Job, token: int) -> Change:
    """End the job as cancelled, once its training has stopped. Raises Fenced for an old token."""
    if job.token == token and job.ended:
        return Change(job)
    require_owner(job, token)
    return _ended(job, "cancelled")


def handed_back(job: Job, token: int) -> Change:
    """Queue the job again because its worker shuts down; the next one resumes from the last checkpoint.

    A requested cancel ends the job instead. Raises Fenced for an old token.
    """
    require_owner(job, token)
    return _ended(job, "cancelled") if job.to_be_cancelled else _queued(job)


def require_owner(job: Job, token: int) -> None:
    """Raise Fenced unless the job runs under ``token``."""
    if job.token != token or job.state != "running":
        raise Fenced(job.id, token, job.token, job.state)


# --- what other workers find ---


def lost(job: Job, token: int) -> Change:
    """Queue the job again because its worker is gone; fail it if that has happened too often.

    A requested cancel ends the job instead. Raises Fenced for an old token.
    """
    require_owner(job, token)
    if job.to_be_cancelled:
        return _ended(job, "cancelled")
    count = job.lost + 1
    if count < (MAX_LOST if job.version is None else MAX_LOST_TRAINED):
        return _queued(replace(job, lost=count))
    step = job.progress.get("step")
    where = f"the last at step {step}" if step is not None else "the last before its first step"
    message = f"{count} workers were lost while they ran this job, {where}; the log of the worker's machine may say why"
    return _ended(replace(job, lost=count, failure=Failure("worker_lost", message)), "failed")


# --- inside ---


def _queued(job: Job) -> Change:
    ran_s = job.ran_s + seconds_since(job.claimed_at) if job.state == "running" else 0.0
    return _told(replace(job, state="queued", token=job.token + 1, queued_at=now(), stage=None, ran_s=ran_s))


def _ended(job: Job, state: State) -> Change:
    return _told(replace(job, state=state, finished_at=now(), stage=None))


def _told(job: Job) -> Change:
    return Change(job, (_state_event(job),))


def _state_event(job: Job) -> Event:
    told: dict[str, Any] = {"state": job.state, "attempt": job.attempt}
    if job.stage is not None:
        told["stage"] = job.stage
    if job.state == "running" and job.to_be_cancelled:
        told["cancel_requested"] = True
    if job.state == "failed" and job.failure is not None:
        told["failure"] = asdict(job.failure)
    if job.state == "succeeded":
        told["result"] = dict(job.result)
    return Event("state", told)
