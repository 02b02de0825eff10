"""``/health``, ``/ready`` and ``/backbones`` on the public port; probes and ``/metrics`` on the admin port."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from prefixes.errors import RegistryUnavailable
from server.web.answer_types import Alive
from server.web.auth import Action, authorize, caller_of
from server.web.openapi import answers
from server.web.responses import METRICS_CONTENT, json_response, metrics_response
from trainer.jobs.errors import JobStoreUnavailable
from trainer.service.answer_schemas import Backbones, Ready
from trainer.service.runtime import allowed, runtime_of

probes = APIRouter(tags=["operations"], default_response_class=Response)
public = APIRouter(tags=["operations"], default_response_class=Response)
admin = APIRouter(tags=["admin"], default_response_class=Response)


@probes.get("/health", summary="Is the process alive", responses=answers(Alive, keyed=False))
async def health() -> Response:
    """Always, when it answers."""
    return json_response({"status": "ok"})


@probes.get(
    "/ready",
    summary="Should traffic come here",
    responses=answers(Ready, JobStoreUnavailable, RegistryUnavailable, keyed=False),
)
async def ready(request: Request) -> Response:
    """503 while draining, and while the place of the jobs does not answer.

    Where keys are needed, also once none can be judged any more: whatever came here would be refused.
    """
    runtime = runtime_of(request)
    runtime.check_taking_work()
    runtime.keyring.check()
    await runtime.service.store.check()
    return json_response({"status": "ready"})


@public.get("/backbones", summary="What jobs may train for", responses=answers(Backbones))
async def backbones(request: Request) -> Response:
    """The names that the operator listed; the first is the default."""
    allowed(request)
    return json_response({"backbones": list(runtime_of(request).settings.backbones)})


@admin.get("/metrics", summary="Prometheus metrics", responses=answers(None, content=METRICS_CONTENT))
async def metrics(request: Request) -> Response:
    """In the text format that the Accept header asks for."""
    authorize(caller_of(request), Action.METRICS, None)
    return await metrics_response(request, runtime_of(request).metrics)
