"""``/prefixes``: upload, list, inspect, download, promote, roll back, delete.

Every path exists as ``/prefixes/{tenant}/{name}…`` and, for the caller's own tenant, as ``/prefixes/{name}…``.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from prefixes.errors import InvalidArtifact, InvalidParameter
from prefixes.registry.base import TaskInfo
from prefixes.registry.records import task_summary, task_to_dict
from prefixes.spec import DEFAULT_ALIAS, PrefixSpec, TaskRef, check_name
from server.auth import Action, authorize, caller_of, may
from server.catalog import validate_upload
from server.engine.types import PrefixKey
from server.parameters import merge_parameters
from server.routes.generate import json_response
from server.runtime import Runtime, runtime_of
from server.schemas import PromoteRequest, RollbackRequest
from server.uploads import Upload, read_upload

router = APIRouter(prefix="/prefixes", tags=["prefixes"])


def _in_path(*names: str) -> dict[str, Any]:
    """What OpenAPI says of path parameters that one handler takes from two paths."""
    schema = {"type": "string"}
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]}


OWN, ANY = _in_path("name"), _in_path("tenant", "name")
FORM: dict[str, Any] = {
    "type": "object",
    "required": ["task", "file"],
    "properties": {
        "task": {"type": "string"},
        "file": {"type": "string", "format": "binary"},
        "alias": {"type": "string", "default": DEFAULT_ALIAS},
        "record": {"type": "string", "description": "A JSON object."},
    },
}
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}


@router.post("", status_code=201, summary="Upload a prefix artifact", openapi_extra=UPLOAD)
async def upload(request: Request) -> Response:
    """Validates the whole artifact, stores it, moves the alias; the task is usable when this answers."""
    runtime, caller = runtime_of(request), caller_of(request)
    runtime.check_taking_work()
    async with read_upload(request, caller) as form, runtime.uploads:
        authorize(caller, Action.PUBLISH, form.tenant)
        data = await form.file.read()
        try:
            published = await runtime.catalog.call(_publish, runtime, form, data)
        finally:
            runtime.catalog.forget(form.tenant, form.name)
    return json_response(published, status=201)


def _publish(runtime: Runtime, form: Upload, data: bytes) -> dict[str, Any]:
    prefix = validate_upload(data, runtime.backbone.spec)
    _check_defaults(runtime, prefix.spec)
    registry = runtime.catalog.registry
    info = registry.publish(form.tenant, form.name, data, alias=form.alias, record=form.record)
    task = registry.inspect(form.tenant, form.name)
    return {
        "task": f"{form.tenant}/{form.name}",
        "version": info.version,
        "aliases": dict(task.aliases),
        "size": info.size,
    }


def _check_defaults(runtime: Runtime, spec: PrefixSpec) -> None:
    try:
        merge_parameters({}, spec.defaults, runtime.backbone.generation_defaults, runtime.service.limits)
    except InvalidParameter as error:
        raise InvalidArtifact(f"defaults: {error.message}", **error.detail) from None


@router.get("", summary="List tasks")
async def list_tasks(request: Request) -> Response:
    """Every task that the caller may see, with its aliases and whether its production version is in memory."""
    runtime, caller = runtime_of(request), caller_of(request)
    residents = runtime.engine.residents()
    tasks = await runtime.catalog.call(runtime.catalog.registry.tasks)
    seen = [task for task in tasks if may(caller, Action.READ, task.tenant)]
    return json_response({"prefixes": [_summary(task, residents) for task in seen]})


def _summary(task: TaskInfo, residents: frozenset[PrefixKey]) -> dict[str, Any]:
    summary = task_summary(task)
    resident = summary["version"] is not None and PrefixKey(task.tenant, summary["version"]) in residents
    return {**summary, "resident": resident}


@router.get("/{name}", summary="Inspect a task of one's own tenant", openapi_extra=OWN)
@router.get("/{tenant}/{name}", summary="Inspect a task: aliases, their history, versions", openapi_extra=ANY)
async def inspect(request: Request) -> Response:
    """Aliases, their moves, and every version with its metadata and record."""
    runtime = runtime_of(request)
    tenant, name = _target(request, Action.READ)
    return json_response(task_to_dict(await runtime.catalog.call(runtime.catalog.registry.inspect, tenant, name)))


@router.get("/{name}/versions/{version}", summary="Download an artifact of one's own tenant", openapi_extra=OWN)
@router.get("/{tenant}/{name}/versions/{version}", summary="Download an artifact", openapi_extra=ANY)
async def download(request: Request, version: str) -> Response:
    """The artifact's bytes, exactly as they were published."""
    runtime = runtime_of(request)
    tenant, name = _target(request, Action.READ)
    ref = TaskRef.parse(f"{tenant}/{name}@{version}")
    registry = runtime.catalog.registry
    async with runtime.uploads:
        resolved = await runtime.catalog.call(registry.resolve, ref)
        data = await runtime.catalog.call(registry.fetch, tenant, resolved.version)
    headers = {
        "content-disposition": f'attachment; filename="{name}.safetensors"',
        "etag": f'"{resolved.version}"',
        "x-prefixd-version": resolved.version,
    }
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.post("/{name}/promote", summary="Point an alias of one's own task at a version", openapi_extra=OWN)
@router.post("/{tenant}/{name}/promote", summary="Point an alias at a version", openapi_extra=ANY)
async def promote(body: PromoteRequest, request: Request) -> Response:
    """409 `conflict` when `expected_current` is given and the alias points elsewhere."""
    runtime = runtime_of(request)
    tenant, name = _target(request, Action.PROMOTE)
    task = await runtime.catalog.call(
        runtime.catalog.registry.promote,
        tenant,
        name,
        body.version,
        alias=body.alias,
        expected_current=body.expected_current,
    )
    runtime.catalog.forget(tenant, name)
    return json_response(task_to_dict(task))


@router.post("/{name}/rollback", summary="Point an alias of one's own task at the version before", openapi_extra=OWN)
@router.post("/{tenant}/{name}/rollback", summary="Point an alias at the version before", openapi_extra=ANY)
async def rollback(request: Request, body: RollbackRequest | None = None) -> Response:
    """409 `conflict` when there is none."""
    runtime = runtime_of(request)
    tenant, name = _target(request, Action.PROMOTE)
    alias = (body or RollbackRequest()).alias
    task = await runtime.catalog.call(runtime.catalog.registry.rollback, tenant, name, alias=alias)
    runtime.catalog.forget(tenant, name)
    return json_response(task_to_dict(task))


@router.delete("/{name}", status_code=204, summary="Delete a task of one's own tenant", openapi_extra=OWN)
@router.delete("/{tenant}/{name}", status_code=204, summary="Delete a task and all its versions", openapi_extra=ANY)
async def delete(request: Request) -> Response:
    """Running rows keep what they have; new requests get 404."""
    runtime = runtime_of(request)
    tenant, name = _target(request, Action.DELETE)
    await runtime.catalog.call(runtime.catalog.registry.delete, tenant, name)
    runtime.catalog.forget(tenant, name)
    return Response(status_code=204)


def _target(request: Request, action: Action) -> tuple[str, str]:
    """Tenant and name that the path says, checked and allowed."""
    caller = caller_of(request)
    tenant = check_name("tenant", request.path_params.get("tenant", caller.tenant))
    name = check_name("task", request.path_params["name"])
    authorize(caller, action, tenant)
    return tenant, name
