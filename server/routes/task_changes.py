"""Changes of a task below ``/prefixes``: promote, roll back, share, delete, undelete."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from prefixes.errors import Conflict, LimitReached, QuotaExceeded
from prefixes.registry.records import task_to_dict
from prefixes.spec import VERSION_PATTERN
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.model import Share
from prefixes.tenancy.records import share_to_dict
from server.answer_schemas import Task
from server.key_schemas import Shared, ShareRequest
from server.routes.task_paths import ANY, CHANGE, OWN, target
from server.runtime import runtime_of
from server.schemas import PromoteRequest, RollbackRequest
from server.web.auth import Action, caller_of
from server.web.json_body import JsonRoute
from server.web.openapi import BODY, answers
from server.web.responses import json_response

router = APIRouter(prefix="/prefixes", tags=["prefixes"], default_response_class=Response, route_class=JsonRoute)

DIGEST_IN_PATH = Path(json_schema_extra={"pattern": VERSION_PATTERN})
MOVED = answers(Task, *BODY, *CHANGE, Conflict, LimitReached)
DELETED = answers(None, *CHANGE, status=204)
SHARED = answers(Shared, *BODY, *CHANGE, Conflict)
VERSION_DELETED = answers(None, *CHANGE, Conflict, status=204)
UNDELETED = answers(Task, *CHANGE, Conflict, LimitReached, QuotaExceeded)


@router.post(
    "/{name}/promote", summary="Point an alias of one's own task at a version", openapi_extra=OWN, responses=MOVED
)
@router.post("/{tenant}/{name}/promote", summary="Point an alias at a version", openapi_extra=ANY, responses=MOVED)
async def promote(body: PromoteRequest, request: Request) -> Response:
    """409 `conflict` when `expected_current` is given and the alias points elsewhere."""
    runtime = runtime_of(request)
    tenant, name = target(request, Action.PROMOTE)
    task = await runtime.catalog.call(
        runtime.catalog.registry.promote,
        tenant,
        name,
        body.version,
        alias=body.alias,
        expected_current=body.expected_current,
        actor=caller_of(request).actor,
    )
    runtime.catalog.forget(tenant, name)
    return json_response(task_to_dict(task))


@router.post(
    "/{name}/rollback",
    summary="Point an alias of one's own task at the version before",
    openapi_extra=OWN,
    responses=MOVED,
)
@router.post(
    "/{tenant}/{name}/rollback", summary="Point an alias at the version before", openapi_extra=ANY, responses=MOVED
)
async def rollback(request: Request, body: RollbackRequest | None = None) -> Response:
    """409 `conflict` when there is none, or when `expected_current` is given and the alias points elsewhere."""
    runtime = runtime_of(request)
    tenant, name = target(request, Action.PROMOTE)
    given = body or RollbackRequest()
    task = await runtime.catalog.call(
        runtime.catalog.registry.rollback,
        tenant,
        name,
        alias=given.alias,
        expected_current=given.expected_current,
        actor=caller_of(request).actor,
    )
    runtime.catalog.forget(tenant, name)
    return json_response(task_to_dict(task))


@router.delete(
    "/{name}", status_code=204, summary="Delete a task of one's own tenant", openapi_extra=OWN, responses=DELETED
)
@router.delete(
    "/{tenant}/{name}",
    status_code=204,
    summary="Delete a task and all its versions",
    openapi_extra=ANY,
    responses=DELETED,
)
async def delete(request: Request) -> Response:
    """Running rows keep what they have; new requests get 404. The task can be brought back until it is cleaned away."""
    runtime = runtime_of(request)
    tenant, name = target(request, Action.DELETE)
    await runtime.catalog.call(runtime.catalog.registry.delete, tenant, name, actor=caller_of(request).actor)
    runtime.catalog.forget(tenant, name)
    return Response(status_code=204)


@router.delete(
    "/{name}/versions/{version}",
    status_code=204,
    summary="Delete a version of one's own task",
    openapi_extra=OWN,
    responses=VERSION_DELETED,
)
@router.delete(
    "/{tenant}/{name}/versions/{version}",
    status_code=204,
    summary="Delete a version",
    openapi_extra=ANY,
    responses=VERSION_DELETED,
)
async def delete_version(request: Request, version: Annotated[str, DIGEST_IN_PATH]) -> Response:
    """409 `conflict` while an alias points at it. Running rows keep what they have."""
    runtime = runtime_of(request)
    tenant, name = target(request, Action.DELETE)
    registry, actor = runtime.catalog.registry, caller_of(request).actor
    await runtime.catalog.call(registry.delete_version, tenant, name, version, actor=actor)
    runtime.catalog.forget(tenant, name)
    return Response(status_code=204)


@router.post(
    "/{name}/undelete", summary="Bring back a deleted task of one's own tenant", openapi_extra=OWN, responses=UNDELETED
)
@router.post("/{tenant}/{name}/undelete", summary="Bring back a deleted task", openapi_extra=ANY, responses=UNDELETED)
async def undelete(request: Request) -> Response:
    """The one of that name deleted last, with its aliases and versions. 409 `conflict` when there is one again."""
    runtime = runtime_of(request)
    tenant, name = target(request, Action.DELETE)
    caller = caller_of(request)
    quota = runtime.keyring.registry_quota(tenant, caller.key_id)
    task = await runtime.catalog.call(
        runtime.catalog.registry.undelete, tenant, name, actor=caller.actor, quota=quota
    )
    runtime.catalog.forget(tenant, name)
    return json_response(task_to_dict(task))


@router.post(
    "/{name}/share", summary="Share a task of one's own tenant", openapi_extra=OWN, responses=SHARED
)
@router.post("/{tenant}/{name}/share", summary="Share a task", openapi_extra=ANY, responses=SHARED)
async def share(body: ShareRequest, request: Request) -> Response:
    """With everyone, with some tenants, or with nobody again. They generate with it and read its card."""
    runtime = runtime_of(request)
    tenant, name = target(request, Action.SHARE)
    registry = runtime.catalog.registry
    wanted = Share(body.everyone, frozenset(body.tenants), body.download)
    if not wanted.private:  # a share stays when its task is deleted, and can be ended then
        await runtime.catalog.call(registry.inspect, tenant, name)
    shared = await runtime.catalog.call(
        Directory(registry.tenancy).share, f"{tenant}/{name}", wanted, actor=caller_of(request).actor
    )
    await anyio.to_thread.run_sync(runtime.keyring.look)
    return json_response(share_to_dict(shared))
