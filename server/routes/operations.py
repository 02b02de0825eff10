"""``/health``, ``/ready`` and ``/metrics``: for those who run the server."""

from __future__ import annotations

import anyio.to_thread
from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from server.errors import NotReady
from server.routes.generate import json_response
from server.runtime import runtime_of

router = APIRouter(tags=["operations"])


@router.get("/health", summary="Is the process alive, and its engine")
async def health(request: Request) -> Response:
    """503 when the engine's thread has died: only a restart helps."""
    if not runtime_of(request).engine.healthy:
        raise NotReady("the engine has stopped")
    return json_response({"status": "ok"})


@router.get("/ready", summary="Should traffic come here")
async def ready(request: Request) -> Response:
    """503 while draining, when the engine has stopped, and while the registry does not answer."""
    runtime = runtime_of(request)
    runtime.check_taking_work()
    await runtime.catalog.check()
    return json_response(
        {"status": "ready", "backbone": runtime.backbone_name, "fingerprint": runtime.backbone.spec.fingerprint}
    )


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """In the text format that the Accept header asks for."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    body = await anyio.to_thread.run_sync(encode, runtime_of(request).metrics)
    return Response(body, headers={"content-type": content_type})
