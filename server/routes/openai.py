"""``/v1/completions`` and ``/v1/models``, for OpenAI's clients. A task is a model; its template applies."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from prefixes.errors import (
    InvalidName,
    InvalidParameter,
    PrefixdError,
    RegistryUnavailable,
    TaskNotFound,
)
from prefixes.spec import DEFAULT_ALIAS, DEFAULT_TENANT, REFERENCE_PATTERN, TaskRef
from server.limit_headers import documented, told_of
from server.openai.answer_schemas import Model, ModelList, TextCompletion
from server.openai.answers import model_body
from server.openai.completion import Completion
from server.openai.offsets import TokenTexts
from server.openai.schemas import CompletionRequest
from server.registry.listing import visible_tasks
from server.routes.generate import ERRORS
from server.runtime import Runtime, request_id_of, runtime_of
from server.service import Running
from server.web.auth import Action, authorize, caller_of
from server.web.json_body import JsonRoute
from server.web.openapi import SETTING, answers, events
from server.web.responses import json_response
from server.web.sse import EventStreamResponse, unless_disconnected, until_disconnect

router = APIRouter(prefix="/v1", tags=["openai"], default_response_class=Response, route_class=JsonRoute)

MODEL = Path(json_schema_extra={"anyOf": [{"pattern": REFERENCE_PATTERN}, {SETTING: "backbone_name"}]})


@router.post(
    "/completions",
    summary="OpenAI's completions",
    responses=documented(answers(TextCompletion, *ERRORS, content=events(), openai=True)),
)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """All prompts are admitted, or none is; each is a request for limits.

    What OpenAI has and this server has not is an error, never ignored.
    """
    runtime, request_id = runtime_of(request), request_id_of(request)
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options: expected only with stream", parameter="stream_options")
    running: list[Running] = await unless_disconnected(request.receive, _admit_all(runtime, body, request))
    texts = [TokenTexts(runtime.backbone.tokenizer.backend_tokenizer, one.prompt_ids) for one in running]
    usage = bool(body.stream_options and body.stream_options.include_usage)
    answer = Completion(f"cmpl-{request_id}", body.model, running, texts, usage)
    if body.stream:
        return EventStreamResponse(answer.stream(), abort=answer.abort, heartbeat_s=runtime.settings.heartbeat_s)
    return json_response(await until_disconnect(request.receive, answer.whole(), answer.abort))


async def _admit_all(runtime: Runtime, body: CompletionRequest, request: Request) -> list[Running]:
    service, caller = runtime.service, caller_of(request)
    task = None if body.model == runtime.backbone_name else body.model
    parameters = body.parameters()
    prepared = [
        await service.prepare(caller, task, text, parameters, f"{request_id_of(request)}-{index}")
        for index, text in enumerate(body.prompts(runtime.settings.max_batch_items))
    ]
    running: list[Running] = []
    with await service.reserve(caller, prepared, told_of(request)) as reservation:
        try:
            for one in prepared:
                running.append(service.submit(one, reservation))
        except PrefixdError:
            for admitted in running:
                admitted.stream.abort()
            raise
    return running


@router.get(
    "/models",
    summary="OpenAI's list of models: the backbone and every task",
    responses=answers(ModelList, RegistryUnavailable, openai=True),
)
async def models(request: Request) -> Response:
    """The bare backbone first, then each task with a production version, under the name that a request uses."""
    runtime, caller = runtime_of(request), caller_of(request)
    authorize(caller, Action.READ, caller.tenant)
    listed = [_backbone_model(runtime)]
    for task in await runtime.catalog.call_alone(visible_tasks, runtime.catalog.registry, caller):
        version = task.aliases.get(DEFAULT_ALIAS)
        info = next((info for info in task.versions if info.version == version), None)
        if info:
            name = task.name if task.tenant == caller.tenant else f"{task.tenant}/{task.name}"
            listed.append(model_body(name, _seconds(info.published_at), task.tenant, info.version))
    return json_response({"object": "list", "data": listed})


@router.get(
    "/models/{model:path}",
    summary="One of OpenAI's models",
    responses=answers(Model, InvalidName, TaskNotFound, RegistryUnavailable, openai=True),
)
async def model(request: Request, model: Annotated[str, MODEL]) -> Response:
    """Any reference that a request may use as its model."""
    runtime, caller = runtime_of(request), caller_of(request)
    if model == runtime.backbone_name:
        authorize(caller, Action.READ, None)
        return json_response(_backbone_model(runtime))
    ref = TaskRef.parse(model, caller.tenant)
    authorize(caller, Action.READ, ref.tenant, ref.name)
    resolved = await runtime.catalog.call(runtime.catalog.registry.resolve, ref)
    task = await runtime.catalog.call(runtime.catalog.registry.inspect, ref.tenant, ref.name)
    published = next((info.published_at for info in task.versions if info.version == resolved.version), "")
    return json_response(model_body(model, _seconds(published), ref.tenant, resolved.version))


def _backbone_model(runtime: Runtime) -> dict[str, Any]:
    return model_body(runtime.backbone_name, 0, DEFAULT_TENANT, runtime.backbone.spec.fingerprint)


def _seconds(at: str) -> int:
    try:
        return int(datetime.fromisoformat(at).timestamp())
    except ValueError:
        return 0
