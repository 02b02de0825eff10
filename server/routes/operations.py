"""``/health`` and ``/ready``: for probes and load balancers, on both ports."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from prefixes.errors import NotReady, RegistryUnavailable
from server.answer_schemas import Ready
from server.runtime import runtime_of
from server.web.answer_types import Alive
from server.web.openapi import answers
from server.web.responses import json_response

router = APIRouter(tags=["operations"], default_response_class=Response)


@router.get("/health", summary="Is the process alive, and its engine", responses=answers(Alive, NotReady, keyed=False))
async def health(request: Request) -> Response:
    """503 when the engine's thread has died, or while its step does not come back: only a restart helps."""
    runtime_of(request).engine.check_alive()
    return json_response({"status": "ok"})


@router.get(
    "/ready",
    summary="Should traffic come here",
    responses=answers(Ready, NotReady, RegistryUnavailable, keyed=False),
)
async def ready(request: Request) -> Response:
    """503 while draining, when the engine has stopped or hangs, and with the registry away for ``max_stale_s``.

    Where keys are needed, also once none can be judged any more: whatever came here would be refused.
    """
    runtime = runtime_of(request)
    runtime.check_taking_work()
    runtime.keyring.check()
    await runtime.catalog.check()
    return json_response(
        {"status": "ready", "backbone": runtime.backbone_name, "fingerprint": runtime.backbone.spec.fingerprint}
    )
