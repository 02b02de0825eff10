"""``GET /audit``: who changed a tenant's tasks, keys and shares, and who was refused. Owns what a caller may see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from prefixes.errors import InvalidName, RegistryUnavailable
from prefixes.registry.records import audit_to_dict
from prefixes.tenancy.denial import Denial, denial_to_dict
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.records import change_to_dict
from server.answer_schemas import Audit
from server.runtime import runtime_of
from server.schemas import AuditQuery
from server.web.auth import Action, authorize, caller_of, tenant_asked
from server.web.errors import InvalidRequest
from server.web.json_body import JsonRoute
from server.web.openapi import answers
from server.web.responses import json_response
from server.web.strict_query import EACH_ONCE

router = APIRouter(tags=["audit"], default_response_class=Response, route_class=JsonRoute)


@router.get(
    "/audit",
    summary="A tenant's last changes and denials",
    dependencies=[EACH_ONCE],
    responses=answers(Audit, InvalidRequest, InvalidName, RegistryUnavailable),
)
async def audit(request: Request, query: Annotated[AuditQuery, Query()]) -> Response:
    """Of tasks, of keys and shares, and who was refused, the latest first of each.

    Of one's own tenant; an operator names any, or asks for who came without a known key.
    """
    caller, catalog = caller_of(request), runtime_of(request).catalog
    authorize(caller, Action.KEYS, caller.tenant)
    tenant = tenant_asked(caller, query.tenant) or caller.tenant
    if query.unknown:
        authorize(caller, Action.OPERATE, None)
        unknown = await catalog.call(catalog.registry.tenancy.denials, None)
        return json_response({"entries": [], "changes": [], "denials": _shown(unknown, query.limit)})
    entries = await catalog.call(catalog.registry.audit, tenant, limit=query.limit)
    denials = await catalog.call(catalog.registry.tenancy.denials, tenant)
    state = await catalog.call(Directory(catalog.registry.tenancy).load)
    changes = [change_to_dict(change) for change in reversed(state.changes) if change.tenant == tenant]
    return json_response(
        {
            "entries": [audit_to_dict(entry) for entry in entries],
            "changes": changes[: query.limit],
            "denials": _shown(denials, query.limit),
        }
    )


def _shown(denials: Sequence[Denial], limit: int) -> list[dict[str, Any]]:
    return [denial_to_dict(denial) for denial in denials[:limit]]
