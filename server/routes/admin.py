"""The admin port's own routes: metrics, what is in memory, and the registry's clean-up.

Owns answers for operators, about all tenants, and for Prometheus. Knows no engine's or registry's insides.
"""

from __future__ import annotations

import logging
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from prefixes.errors import InvalidParameter, RegistryFull, RegistryUnavailable
from prefixes.registry.base import CONFIRMED_BELOW_S
from server.answer_schemas import Cleaned, Residents
from server.runtime import Runtime, runtime_of
from server.schemas import GcRequest
from server.tiers.metrics import DEVICE
from server.web.auth import Action, authorize, caller_of
from server.web.json_body import JsonRoute
from server.web.openapi import BODY, answers
from server.web.responses import METRICS_CONTENT, json_response, metrics_response

_log = logging.getLogger("prefixd.registry")

router = APIRouter(tags=["admin"], default_response_class=Response, route_class=JsonRoute)


@router.get("/metrics", summary="Prometheus metrics", responses=answers(None, content=METRICS_CONTENT))
async def metrics(request: Request) -> Response:
    """In the text format that the Accept header asks for."""
    authorize(caller_of(request), Action.METRICS, None)
    return await metrics_response(request, runtime_of(request).metrics)


@router.get("/admin/residents", summary="Prefixes at hand, by tier", responses=answers(Residents))
async def residents(request: Request) -> Response:
    """What the engine holds in blocks, and what is kept in front of the registry."""
    authorize(caller_of(request), Action.OPERATE, None)
    return json_response(await anyio.to_thread.run_sync(_residents, runtime_of(request)))


@router.post(
    "/admin/gc",
    summary="Clean the registry",
    responses=answers(Cleaned, *BODY, InvalidParameter, RegistryUnavailable, RegistryFull),
)
async def gc(request: Request, body: GcRequest) -> Response:
    """Take what was deleted ``retention_s`` ago, and artifacts that nothing names; with ``dry_run`` only say what."""
    authorize(caller_of(request), Action.OPERATE, None)
    catalog = runtime_of(request).catalog
    if body.retention_s < CONFIRMED_BELOW_S and not (body.dry_run or body.confirm):
        raise InvalidParameter(
            f"retention_s: expected {CONFIRMED_BELOW_S:g} or more, or confirm to be true, got {body.retention_s:g}: it "
            "takes for good what was deleted so lately",
            parameter="confirm",
        )
    report = await catalog.call(
        catalog.registry.gc, retention_s=body.retention_s, dry_run=body.dry_run, actor=caller_of(request).actor
    )
    for failed in report.failed:
        _log.warning("registry clean-up: a tenant could not be cleaned", extra={"facts": {"tenant": failed}})
    return json_response(
        {
            "dry_run": body.dry_run,
            "tasks": list(report.tasks),
            "artifacts": list(report.artifacts),
            "freed_bytes": report.freed_bytes,
            "failed": list(report.failed),
        }
    )


def _residents(runtime: Runtime) -> dict[str, Any]:
    stats, kept = runtime.engine.stats(), runtime.tiers.entries()
    in_blocks = sorted((key.tenant, key.version) for key in runtime.engine.residents())
    device = {
        "tier": DEVICE,
        "bytes": stats.resident_prefix_bytes,
        "limit_bytes": stats.resident_prefix_limit_bytes,
        "prefixes": [{"tenant": tenant, "version": version} for tenant, version in in_blocks],
    }
    others = [
        {
            "tier": tier.tier,
            "bytes": tier.nbytes,
            "limit_bytes": tier.limit_bytes,
            "prefixes": [{"tenant": t, "version": v, "bytes": size} for t, v, size in kept[tier.tier]],
        }
        for tier in runtime.tiers.stats().tiers
    ]
    return {"staged_bytes": stats.staged_prefix_bytes, "tiers": [device, *others]}
