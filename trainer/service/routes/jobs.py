"""``/jobs``: submit, list, watch, cancel, retry, delete; and a finished job's report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from prefixes.errors import (
    InvalidArtifact,
    InvalidName,
    InvalidParameter,
    QueueFull,
    QuotaExceeded,
    RegistryUnavailable,
    TaskNotFound,
)
from server.web.auth import tenant_asked
from server.web.errors import Forbidden, InvalidRequest, Unauthorized
from server.web.json_body import JsonRoute
from server.web.openapi import BODY, answers
from server.web.openapi import events as sent_events
from server.web.responses import json_response, to_json
from server.web.sse import EventStreamResponse, event
from server.web.strict_query import EACH_ONCE
from trainer.data.files import DatasetsUnavailable
from trainer.data.store import DatasetNotFound
from trainer.jobs.errors import JobConflict, JobNotFound, JobStoreUnavailable
from trainer.jobs.record import Job
from trainer.service.answer_schemas import JobList, JobRecord
from trainer.service.job_pages import page_of
from trainer.service.runtime import TrainerRuntime, allowed, runtime_of
from trainer.service.schemas import JobBody, JobsQuery

LOOK_S = 2.0
"""How often a stream looks for events when no signal wakes it."""
REPORTS = {"html": ("report.html", "text/html; charset=utf-8"), "json": ("report.json", "application/json")}
SAFE = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox",
    "cache-control": "private, no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

INNER = (
    "token", "worker", "claimed_at", "ran_s", "lost", "actor", "key_id", "planned_steps", "steps", "steps_before",
    "tokens", "tokens_before", "reservation",
)  # fmt: skip
"""Fields of the record that concern only workers."""

router = APIRouter(prefix="/jobs", tags=["jobs"], default_response_class=Response, route_class=JsonRoute)

FIND = (JobNotFound, JobStoreUnavailable)
SUBMITTED = answers(
    JobRecord, *BODY, InvalidName, InvalidParameter, InvalidArtifact, DatasetNotFound, TaskNotFound,
    QuotaExceeded, QueueFull, DatasetsUnavailable, RegistryUnavailable, JobStoreUnavailable, status=201,
)  # fmt: skip
WATCHED = {
    **answers(None, *FIND, content=sent_events("state", "progress", numbered=True)),
    204: {"description": "The job has ended, and nothing is left to tell."},
}
LAST_EVENT = {
    "parameters": [
        {"name": "Last-Event-ID", "in": "header", "schema": {"type": "string"}, "description": "The last one seen."}
    ]
}
REPORTED = answers(
    None,
    *FIND,
    InvalidRequest,
    JobConflict,
    content={"text/html": {"type": "string"}, "application/json": {"type": "object"}},
    headers={name.title(): {"required": True, "schema": {"type": "string"}} for name in SAFE},
)
CHANGED = answers(JobRecord, *FIND, JobConflict)


@router.post("", status_code=201, summary="Submit a training job", responses=SUBMITTED)
async def submit(body: JobBody, request: Request) -> Response:
    """Checked as far as can be without training; then it waits for a worker."""
    runtime, caller = runtime_of(request), allowed(request)
    runtime.check_taking_work()
    return json_response(job_body(await runtime.service.submit(caller, body)), status=201)


@router.get(
    "",
    summary="List jobs",
    dependencies=[EACH_ONCE],
    responses=answers(JobList, InvalidRequest, InvalidName, JobStoreUnavailable),
)
async def jobs(request: Request, query: Annotated[JobsQuery, Query()]) -> Response:
    """The newest first; `next` is the `before` of the next page. Large jobs make short pages.

    One's own tenant's; an operator's of all, or of `tenant`.
    """
    store, tenant = runtime_of(request).service.store, tenant_asked(allowed(request), query.tenant)
    page, following = await page_of(store, tenant, query, job_body)
    return json_response({"jobs": page, "next": following})


@router.get("/{job_id}", summary="What is known of a job", responses=answers(JobRecord, *FIND))
async def job(request: Request, job_id: str) -> Response:
    """Its state, its progress, and what it was asked to do."""
    return json_response(job_body(await _job(request, job_id)))


@router.get("/{job_id}/events", summary="Watch a job", openapi_extra=LAST_EVENT, responses=WATCHED)
async def events(request: Request, job_id: str) -> Response:
    """Server-sent events, `state` and `progress`, from the first on or behind `Last-Event-ID`, until the job ends.

    204 where it has ended and nothing is left to tell, so that an EventSource does not come back.
    """
    runtime = runtime_of(request)
    found = await _job(request, job_id)
    after = request.headers.get("last-event-id")
    if found.ended and not await runtime.service.store.events(found.tenant, job_id, after):
        return Response(status_code=204)
    left = asyncio.Event()
    body = _events(request, found.tenant, job_id, after, left)
    return EventStreamResponse(body, abort=left.set, heartbeat_s=runtime.settings.heartbeat_s)


@router.get("/{job_id}/report", summary="A finished job's report", responses=REPORTED)
async def report(request: Request, job_id: str, format: Literal["html", "json"] = "html") -> Response:
    """409 for a job that has not been trained to its end."""
    found = await _job(request, job_id)
    name, kind = REPORTS[format]
    path = await asyncio.to_thread(_file, runtime_of(request), found, name)
    if path is None:
        raise JobConflict(f"report: expected a job that was trained to its end, got one that is {found.state}")
    return FileResponse(path, media_type=kind, headers=SAFE)


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=CHANGED)
async def cancel(request: Request, job_id: str) -> Response:
    """A running one stops before its next training step, and is `cancelled` then. 409 for one that has ended."""
    caller = allowed(request)
    return json_response(job_body(await runtime_of(request).service.cancel(caller, job_id)))


@router.post(
    "/{job_id}/retry",
    summary="Run a failed or cancelled job again",
    responses=answers(JobRecord, *FIND, JobConflict, InvalidParameter, QuotaExceeded, QueueFull, RegistryUnavailable),
)
async def retry(request: Request, job_id: str) -> Response:
    """From its last checkpoint on. 409 for any other. It counts as an open job, as a new one does."""
    runtime, caller = runtime_of(request), allowed(request)
    runtime.check_taking_work()
    return json_response(job_body(await runtime.service.retry(caller, job_id)))


@router.delete(
    "/{job_id}",
    status_code=204,
    summary="Forget a job",
    responses=answers(None, *FIND, JobConflict, RegistryUnavailable, status=204),
)
async def delete(request: Request, job_id: str) -> Response:
    """Its checkpoint and report go with it; what it published stays. 409 for one that has not ended."""
    await runtime_of(request).service.delete(allowed(request), job_id)
    return Response(status_code=204)


def job_body(job: Job) -> dict[str, Any]:
    """Return the job for the API."""
    told = job.as_dict()
    for inner in INNER:
        told.pop(inner, None)
    return told


async def _job(request: Request, job_id: str) -> Job:
    return await runtime_of(request).service.find(allowed(request), job_id)


async def _events(
    request: Request, tenant: str, job_id: str, after: str | None, left: asyncio.Event
) -> AsyncIterator[bytes]:
    runtime = runtime_of(request)
    store = runtime.service.store
    with store.watch(job_id) as watch:
        while not (left.is_set() or runtime.draining):
            try:
                allowed(request)  # a stream lasts as long as its job, and no longer than its key
                found = await store.get(tenant, job_id)
                news = await store.events(tenant, job_id, after)
            except (JobStoreUnavailable, RegistryUnavailable):
                news, ended = [], False
            except (JobNotFound, Unauthorized, Forbidden):
                return  # deleted, or ended, meanwhile
            else:
                ended = found.ended
            if news:
                after = news[-1].id
                yield b"".join(event(item.name, to_json(item.data), event_id=item.id) for item in news)
            elif ended:
                return
            else:
                await watch.wait(LOOK_S)


def _file(runtime: TrainerRuntime, job: Job, name: str) -> Path | None:
    folder = runtime.service.folders.result(job)
    path = None if folder is None else folder / name
    return path if path is not None and job.version is not None and path.is_file() else None
