"""``/caller``; ``/tenants`` and ``/keys``, for operators, and the latter for a key with the scope ``keys``.

Owns which keys a caller may see and make. Nothing here works while no key was ever made: whoever reached the port first
would own the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from prefixes.errors import Conflict, InvalidName, RegistryFull
from prefixes.spec import NAME_PATTERN
from prefixes.tenancy.changes import key_of, tenant_of
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import NO_LIMITS
from prefixes.tenancy.model import SERVICE_SCOPES, InvalidKey, KeyNotFound, Tenancy
from prefixes.tenancy.records import key_to_dict, tenant_to_dict
from prefixes.tenancy.secret import ID_PATTERN
from server.key_schemas import (
    BlockRequest,
    CallerRecord,
    KeyLimitsRequest,
    KeyList,
    KeyRecord,
    KeyRequest,
    KeysQuery,
    KeyWithSecret,
    LimitsRequest,
    RotateRequest,
    TenantList,
    TenantRecord,
    TenantRequest,
)
from server.runtime import runtime_of
from server.web.auth import Action, Caller, authorize, caller_of, tenant_asked
from server.web.errors import Forbidden, InvalidRequest
from server.web.json_body import JsonRoute
from server.web.openapi import BODY, answers
from server.web.responses import json_response
from server.web.strict_query import EACH_ONCE, NoQuery

_P = ParamSpec("_P")
_T = TypeVar("_T")

router = APIRouter(tags=["keys"], default_response_class=Response, route_class=JsonRoute)

KEY_ID = Path(json_schema_extra={"pattern": ID_PATTERN})
TENANT = Path(json_schema_extra={"pattern": NAME_PATTERN})
CHANGE = (*BODY, RegistryFull)


@router.get("/caller", summary="Whom the server takes you for", responses=answers(CallerRecord))
async def caller(request: Request) -> Response:
    """The tenant that names without one belong to, what the key may do, and the limits; no key where none is needed."""
    found = caller_of(request)
    of_tenant, of_key = NO_LIMITS, NO_LIMITS
    if found.key_id is not None:
        of_tenant, of_key = runtime_of(request).keyring.both_limits_of(found.tenant, found.key_id)
    limits = {"tenant": dict(of_tenant.given()), "key": dict(of_key.given())}
    return json_response(
        {"tenant": found.tenant, "key_id": found.key_id, "scopes": sorted(found.scopes), "limits": limits}
    )


@router.get(
    "/tenants", summary="List tenants", dependencies=[EACH_ONCE], responses=answers(TenantList, InvalidRequest)
)
async def tenants(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
    """Those that were made, or that a key was made for."""
    authorize(_keyed(request), Action.OPERATE, None)
    state = await _call(request, Directory.load)
    return json_response({"tenants": [_tenant(state, name) for name in sorted(state.tenants)]})


@router.post(
    "/tenants",
    status_code=201,
    summary="Make a tenant",
    responses=answers(TenantRecord, *CHANGE, InvalidName, Conflict, status=201),
)
async def create_tenant(body: TenantRequest, request: Request) -> Response:
    """A key for a new name makes its tenant as well."""
    caller = _keyed(request)
    authorize(caller, Action.OPERATE, None)
    await _changed(request, Directory.create_tenant, body.name, actor=caller.actor)
    return json_response(_tenant(await _call(request, Directory.load), body.name), status=201)


@router.get(
    "/tenants/{tenant}", summary="Show a tenant", responses=answers(TenantRecord, InvalidName, KeyNotFound)
)
async def show_tenant(request: Request, tenant: Annotated[str, TENANT]) -> Response:
    """Its limits too: those that were set, and those in force."""
    authorize(_keyed(request), Action.OPERATE, None)
    return json_response(_tenant(await _call(request, Directory.load), tenant))


@router.post(
    "/tenants/{tenant}/block",
    summary="Refuse all keys of a tenant, or no longer",
    responses=answers(TenantRecord, *CHANGE, InvalidName, KeyNotFound),
)
async def block(body: BlockRequest, request: Request, tenant: Annotated[str, TENANT]) -> Response:
    """On every replica within a second."""
    caller = _keyed(request)
    authorize(caller, Action.OPERATE, None)
    await _changed(request, Directory.block, tenant, body.blocked, actor=caller.actor)
    return json_response(_tenant(await _call(request, Directory.load), tenant))


@router.post(
    "/tenants/{tenant}/limits",
    summary="Set what a tenant may take",
    responses=answers(TenantRecord, *CHANGE, InvalidName, InvalidKey, KeyNotFound),
)
async def limits(body: LimitsRequest, request: Request, tenant: Annotated[str, TENANT]) -> Response:
    """On every replica within a second."""
    caller = _keyed(request)
    authorize(caller, Action.OPERATE, None)
    await _changed(
        request, Directory.limit_tenant, tenant, body.limits, weight=body.weight, actor=caller.actor
    )
    return json_response(_tenant(await _call(request, Directory.load), tenant))


@router.get(
    "/keys",
    summary="List keys",
    dependencies=[EACH_ONCE],
    responses=answers(KeyList, InvalidRequest, InvalidName),
)
async def keys(request: Request, query: Annotated[KeysQuery, Query()]) -> Response:
    """Of one's own tenant; an operator's of all, or of `tenant`. Revoked ones stay in the list."""
    caller = _keyed(request)
    tenant = _own(caller, query.tenant)
    state = await _call(request, Directory.load)
    used = await _call(request, Directory.used)
    return json_response({"keys": [key_to_dict(state, key, used) for key in state.keys_of(tenant)]})


@router.post(
    "/keys",
    status_code=201,
    summary="Make a key",
    responses=answers(KeyWithSecret, *CHANGE, InvalidName, InvalidKey, Conflict, status=201),
)
async def create_key(body: KeyRequest, request: Request) -> Response:
    """The only answer with its secret. Scopes beyond one tenant are an operator's to give."""
    caller = _keyed(request)
    tenant = _own(caller, body.tenant) or caller.tenant
    if not caller.operates and (beyond := SERVICE_SCOPES & set(body.scopes)):
        raise Forbidden(f"scopes: expected an operator's key for {', '.join(sorted(beyond))}")
    made = await _changed(
        request, Directory.create_key, tenant, body.name, body.scopes,
        expires_at=body.expires_at, limits=body.limits, actor=caller.actor,
    )  # fmt: skip
    return json_response(made.as_dict(), status=201)


@router.get("/keys/{key_id}", summary="Show a key", responses=answers(KeyRecord, KeyNotFound))
async def show(request: Request, key_id: Annotated[str, KEY_ID]) -> Response:
    """Never its secret."""
    caller = _keyed(request)
    tenant = _own(caller, None)
    state = await _call(request, Directory.load)
    return json_response(key_to_dict(state, key_of(state, key_id, tenant), await _call(request, Directory.used)))


@router.post(
    "/keys/{key_id}/limits",
    summary="Set what a key may take",
    responses=answers(KeyRecord, *CHANGE, KeyNotFound, InvalidKey),
)
async def limit_key(body: KeyLimitsRequest, request: Request, key_id: Annotated[str, KEY_ID]) -> Response:
    """On every replica within a second. Its tenant's hold as well, so that one above them is taken and never met."""
    caller = _keyed(request)
    tenant = _own(caller, None)
    _check_service_key(await _call(request, Directory.load), key_id, caller)
    limited = await _changed(
        request, Directory.limit_key, key_id, body.limits, actor=caller.actor, tenant=tenant
    )
    state = await _call(request, Directory.load)
    return json_response(key_to_dict(state, limited, await _call(request, Directory.used)))


@router.post(
    "/keys/{key_id}/rotate",
    summary="Give a key a new secret",
    responses=answers(KeyWithSecret, *CHANGE, KeyNotFound, InvalidKey, Conflict),
)
async def rotate(request: Request, key_id: Annotated[str, KEY_ID], body: RotateRequest | None = None) -> Response:
    """Id and scopes stay; the secret before works for `grace_s` more."""
    caller, given = _keyed(request), body or RotateRequest()
    tenant = _own(caller, None)
    _check_service_key(await _call(request, Directory.load), key_id, caller)
    made = await _changed(
        request, Directory.rotate, key_id, grace_s=given.grace_s, actor=caller.actor, tenant=tenant
    )
    return json_response(made.as_dict())


@router.delete("/keys/{key_id}", summary="Revoke a key", responses=answers(KeyRecord, RegistryFull, KeyNotFound))
async def revoke(request: Request, key_id: Annotated[str, KEY_ID]) -> Response:
    """For good, on every replica within a second. Doing it again changes nothing."""
    caller = _keyed(request)
    tenant = _own(caller, None)
    _check_service_key(await _call(request, Directory.load), key_id, caller)
    revoked = await _changed(request, Directory.revoke, key_id, actor=caller.actor, tenant=tenant)
    state = await _call(request, Directory.load)
    return json_response(key_to_dict(state, revoked, await _call(request, Directory.used)))


def _keyed(request: Request) -> Caller:
    """The caller, who has a key. Raises Forbidden while nobody needs one."""
    caller = caller_of(request)
    if caller.key_id is None:
        raise Forbidden("no key was ever made here: make the first with `prefixd keys create --registry URL`")
    return caller


def _own(caller: Caller, tenant: str | None) -> str | None:
    """The tenant whose keys it is about, None for an operator's "all". Another's keys are not to be known of."""
    authorize(caller, Action.KEYS, caller.tenant)
    return tenant_asked(caller, tenant)


def _check_service_key(state: Tenancy, key_id: str, caller: Caller) -> None:
    """A tenant's key must not take over an operator's of the same tenant."""
    if not caller.operates and key_of(state, key_id, caller.tenant).scopes & SERVICE_SCOPES:
        raise Forbidden("key: expected an operator's key to change one with the scope operator or metrics")


async def _call(request: Request, method: Callable[[Directory], _T]) -> _T:
    catalog = runtime_of(request).catalog
    return await catalog.call(method, Directory(catalog.registry.tenancy))


async def _changed(request: Request, method: Callable[..., _T], *args: Any, **given: Any) -> _T:
    """Make a change, and know of it here at once."""
    runtime = runtime_of(request)
    made = await runtime.catalog.call(method, Directory(runtime.catalog.registry.tenancy), *args, **given)
    await anyio.to_thread.run_sync(runtime.keyring.look)
    return made


def _tenant(state: Tenancy, name: str) -> dict[str, Any]:
    return tenant_to_dict(state, tenant_of(state, name))
