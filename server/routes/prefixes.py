"""``/prefixes``: upload, list, inspect, download."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from prefixes.errors import (
    Conflict,
    DiskFull,
    IncompatiblePrefix,
    InvalidArtifact,
    InvalidParameter,
    LimitReached,
    NotReady,
    QuotaExceeded,
    RegistryUnavailable,
    TaskNotFound,
)
from prefixes.registry.base import Registry, TaskInfo
from prefixes.registry.records import task_summary, task_to_dict
from prefixes.registry.transitions import published_with
from prefixes.spec import DIGEST, NO_TWO_DOTS, PART, VERSION_PATTERN, TaskRef
from server.answer_schemas import Published, Task, TaskList
from server.engine.types import PrefixKey
from server.registry.listing import visible_tasks
from server.routes.task_paths import ANY, CHANGE, FIND, OWN, target
from server.runtime import Runtime, runtime_of
from server.uploads import FORM, Upload, read_upload, validate_upload
from server.web.auth import Action, Caller, authorize, caller_of
from server.web.errors import InvalidRequest
from server.web.json_body import JsonRoute
from server.web.openapi import BODY, answers
from server.web.responses import json_response
from server.web.strict_query import EACH_ONCE, NoQuery

router = APIRouter(prefix="/prefixes", tags=["prefixes"], default_response_class=Response, route_class=JsonRoute)


UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}
VERSION = Path(json_schema_extra={"pattern": f"^{NO_TWO_DOTS}(?:{PART}|{DIGEST})$"}, description="Or an alias.")
ARTIFACT = {"application/octet-stream": {"type": "string", "format": "binary"}}
ARTIFACT_HEADERS = {
    "ETag": {"required": True, "schema": {"type": "string"}},
    "Content-Disposition": {"required": True, "schema": {"type": "string"}},
    "X-Prefixd-Version": {"required": True, "schema": {"type": "string", "pattern": VERSION_PATTERN}},
}

UPLOADED = answers(
    Published, *BODY, *CHANGE, InvalidArtifact, InvalidParameter, IncompatiblePrefix, Conflict, LimitReached,
    QuotaExceeded, DiskFull, NotReady,
    status=201,
)  # fmt: skip
LISTED = answers(TaskList, InvalidRequest, RegistryUnavailable)
INSPECTED = answers(Task, *FIND)
DOWNLOADED = answers(None, *FIND, content=ARTIFACT, headers=ARTIFACT_HEADERS)


@router.post("", status_code=201, summary="Upload a prefix artifact", openapi_extra=UPLOAD, responses=UPLOADED)
async def upload(request: Request) -> Response:
    """Validates the whole artifact, stores it, moves the alias; the task is usable when this answers."""
    runtime, caller = runtime_of(request), caller_of(request)
    runtime.check_taking_work()
    authorize(caller, Action.PUBLISH, caller.tenant)  # the form names the tenant, and is read later
    runtime.catalog.require_up()
    async with runtime.uploads.place(request, caller.tenant), read_upload(request, caller) as form:
        authorize(caller_of(request), Action.PUBLISH, form.tenant, form.name)
        runtime.catalog.require_up()  # else it would wait for earlier uploads, which wait for the registry
        async with runtime.transfers:
            data = await form.file.read()
            try:
                published = await runtime.catalog.call(_publish, runtime, form, data, caller)
                runtime.catalog.forget(form.tenant, form.name)
            except BaseException:
                runtime.catalog.changed(form.tenant, form.name)  # it may have been: the answer may be lost
                raise
            finally:
                runtime.trim_soon()
    return json_response(published, status=201)


def _publish(runtime: Runtime, form: Upload, data: bytes, caller: Caller) -> dict[str, Any]:
    registry = runtime.catalog.registry
    if not _was_published(registry, form):
        validate_upload(data, runtime.backbone, runtime.service.limits, runtime.engine)
    info = registry.publish(
        form.tenant,
        form.name,
        data,
        alias=form.alias,
        expected_current=form.expected_current,
        record=form.record,
        actor=caller.actor,
        idempotency_key=form.idempotency_key,
        note=form.note,
        quota=runtime.keyring.registry_quota(form.tenant, caller.key_id),
    )
    task = registry.inspect(form.tenant, form.name)
    return {
        "task": f"{form.tenant}/{form.name}",
        "version": info.version,
        "aliases": dict(task.aliases),
        "size": info.size,
    }


def _was_published(registry: Registry, form: Upload) -> bool:
    """Whether the task knows the upload's key. Such an upload changes nothing, so its content need not be checked."""
    if form.idempotency_key is None:
        return False
    try:
        return published_with(registry.inspect(form.tenant, form.name), form.idempotency_key) is not None
    except TaskNotFound:
        return False


@router.get("", summary="List tasks", dependencies=[EACH_ONCE], responses=LISTED)
async def list_tasks(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
    """Every task that the caller may see, with its aliases and whether its production version is in memory."""
    runtime, caller = runtime_of(request), caller_of(request)
    authorize(caller, Action.READ, caller.tenant)
    residents = runtime.engine.residents()
    tasks = await runtime.catalog.call_alone(visible_tasks, runtime.catalog.registry, caller)
    return json_response({"prefixes": [_summary(task, residents) for task in tasks]})


def _summary(task: TaskInfo, residents: frozenset[PrefixKey]) -> dict[str, Any]:
    summary = task_summary(task)
    resident = summary["version"] is not None and PrefixKey(task.tenant, summary["version"]) in residents
    return {**summary, "resident": resident}


@router.get("/{name}", summary="Inspect a task of one's own tenant", openapi_extra=OWN, responses=INSPECTED)
@router.get(
    "/{tenant}/{name}",
    summary="Inspect a task: aliases, their history, versions",
    openapi_extra=ANY,
    responses=INSPECTED,
)
async def inspect(request: Request) -> Response:
    """Aliases, their moves, and every version with its metadata and record."""
    runtime = runtime_of(request)
    tenant, name = target(request, Action.INSPECT)
    return json_response(task_to_dict(await runtime.catalog.call(runtime.catalog.registry.inspect, tenant, name)))


@router.get(
    "/{name}/versions/{version}",
    summary="Download an artifact of one's own tenant",
    openapi_extra=OWN,
    responses=DOWNLOADED,
)
@router.get(
    "/{tenant}/{name}/versions/{version}", summary="Download an artifact", openapi_extra=ANY, responses=DOWNLOADED
)
async def download(request: Request, version: Annotated[str, VERSION]) -> Response:
    """The artifact's bytes, exactly as they were published."""
    runtime = runtime_of(request)
    tenant, name = target(request, Action.DOWNLOAD)
    ref = TaskRef.parse(f"{tenant}/{name}@{version}")
    registry = runtime.catalog.registry
    runtime.catalog.require_up()
    async with runtime.transfers:
        resolved = await runtime.catalog.call(registry.resolve, ref)
        data = await runtime.catalog.call(registry.fetch, tenant, resolved.version)
    headers = {
        "content-disposition": f'attachment; filename="{name}.safetensors"',
        "etag": f'"{resolved.version}"',
        "x-prefixd-version": resolved.version,
    }
    return Response(data, media_type="application/octet-stream", headers=headers)
