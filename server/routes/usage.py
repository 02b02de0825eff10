"""``GET /usage``: what a tenant used, and what that costs. Owns whose usage a caller may see."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from prefixes.errors import InvalidName, InvalidParameter, RegistryUnavailable
from prefixes.usage.model import asked_days
from prefixes.usage.table import parse_by, summed
from server.runtime import runtime_of
from server.usage_schemas import UsageAnswer, UsageQuery
from server.web.auth import Action, authorize, caller_of, tenant_asked
from server.web.errors import InvalidRequest
from server.web.json_body import JsonRoute
from server.web.openapi import answers
from server.web.responses import json_response
from server.web.strict_query import EACH_ONCE

router = APIRouter(tags=["usage"], default_response_class=Response, route_class=JsonRoute)


@router.get(
    "/usage",
    summary="What a tenant used",
    dependencies=[EACH_ONCE],
    responses=answers(UsageAnswer, InvalidRequest, InvalidName, InvalidParameter, RegistryUnavailable),
)
async def usage(request: Request, query: Annotated[UsageQuery, Query()]) -> Response:
    """Requests, tokens and training of whole days in UTC. One's own tenant's; an operator's of all, or of `tenant`.

    It is behind by up to `--usage-flush-s` of each replica.
    """
    caller, runtime = caller_of(request), runtime_of(request)
    authorize(caller, Action.KEYS, caller.tenant)
    whose = tenant_asked(caller, query.tenant)
    first, last = asked_days(query.first, query.last)
    by = parse_by(query.by)

    def read_usage() -> dict[str, Any]:
        rows = runtime.catalog.registry.usage.read(first, last, whose)
        return summed(rows, first, last, by=by, tenant=whose, prices=runtime.prices)

    return json_response(await runtime.catalog.call_alone(read_usage))
