"""``/v1/completions`` and ``/v1/models``: what OpenAI's clients speak. A task is a model; its template applies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from prefixes.errors import InvalidParameter, PrefixdError
from prefixes.spec import DEFAULT_ALIAS, DEFAULT_TENANT, TaskRef
from server.engine.types import Event, Failed, Finished, TokenEvent
from server.openai.answers import ChunkWriter, chunk, completion, model_body, usage_body
from server.openai.schemas import CompletionRequest
from server.registry.listing import visible_tasks
from server.runtime import Runtime, request_id_of, runtime_of
from server.service import Running
from server.web.auth import Action, authorize, caller_of
from server.web.errors import encode_error, openai_error_body
from server.web.responses import json_response, to_json
from server.web.sse import EventStreamResponse, data_event, until_disconnect

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/completions", summary="OpenAI's completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """All prompts are admitted, or none is. What OpenAI has and this server has not is an error, never ignored."""
    runtime, request_id = runtime_of(request), request_id_of(request)
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options: expected only with stream", parameter="stream_options")
    running = await _admit_all(runtime, body, request)
    answer = _Completion(runtime, body, f"cmpl-{request_id}", running)
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
    try:
        for one in prepared:
            running.append(service.submit(one))
    except PrefixdError:
        for admitted in running:
            admitted.stream.abort()
        raise
    return running


class _Completion:
    """One request's answer, from all its prompts."""

    def __init__(self, runtime: Runtime, body: CompletionRequest, id: str, running: list[Running]) -> None:
        self._frame = (id, int(time.time()), body.model)
        self._running = running
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        tokenizer = runtime.backbone.tokenizer
        self._token_text = lambda token_id: str(tokenizer.decode([token_id]))

    def abort(self) -> None:
        """End all prompts."""
        for running in self._running:
            running.stream.abort()

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece. The first prompt to fail fails the request, and the others end."""
        try:
            finished = [await running.stream.result() for running in self._running]
        finally:
            self.abort()
        return completion(*self._frame, finished, self._token_text)

    async def stream(self) -> AsyncIterator[bytes]:
        """``data:`` chunks, then ``data: [DONE]``; an error ends the stream, as OpenAI's does."""
        writers, first = [], 0
        for running in self._running:
            writers.append(ChunkWriter(first, self._token_text))
            first += running.params.num_return_sequences
        ended: list[Finished] = []
        async for which, events in self._merged():
            choices: list[dict[str, Any]] = []
            for event in events:
                if isinstance(event, TokenEvent):
                    choices += writers[which].token(event)
                elif isinstance(event, Failed):
                    self.abort()
                    yield data_event(encode_error(openai_error_body(event.error)))
                    return
                else:
                    choices += writers[which].end(event)
                    ended.append(event)
            if choices:
                yield b"".join(data_event(to_json(chunk(*self._frame, [one]))) for one in choices)
        if self._include_usage:
            usage = usage_body([finished.usage for finished in ended])
            yield data_event(to_json({**chunk(*self._frame, []), "usage": usage}))
        yield data_event(b"[DONE]")

    async def _merged(self) -> AsyncIterator[tuple[int, list[Event]]]:
        """The events of all prompts as they come, each with its prompt's number."""
        if len(self._running) == 1:
            stream = self._running[0].stream
            async for event in stream:
                yield 0, [event, *stream.take_ready()]
            return
        arrived: asyncio.Queue[tuple[int, list[Event]]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(which, one, arrived)) for which, one in enumerate(self._running)]
        try:
            left = len(pumps)
            while left:
                which, events = await arrived.get()
                left -= isinstance(events[-1], Finished | Failed)
                yield which, events
        finally:
            for pump in pumps:
                pump.cancel()


async def _pump(which: int, running: Running, arrived: asyncio.Queue[tuple[int, list[Event]]]) -> None:
    async for event in running.stream:
        arrived.put_nowait((which, [event, *running.stream.take_ready()]))


@router.get("/models", summary="OpenAI's list of models: the backbone and every task")
async def models(request: Request) -> Response:
    """The bare backbone first, then each task with a production version, under the name that a request uses."""
    runtime, caller = runtime_of(request), caller_of(request)
    listed = [_backbone_model(runtime)]
    for task in await runtime.catalog.call_alone(visible_tasks, runtime.catalog.registry, caller):
        version = task.aliases.get(DEFAULT_ALIAS)
        info = next((info for info in task.versions if info.version == version), None)
        if info:
            name = task.name if task.tenant == caller.tenant else f"{task.tenant}/{task.name}"
            listed.append(model_body(name, _seconds(info.published_at), task.tenant, info.version))
    return json_response({"object": "list", "data": listed})


@router.get("/models/{model:path}", summary="One of OpenAI's models")
async def model(request: Request, model: str) -> Response:
    """Any reference that a request may use as its model."""
    runtime, caller = runtime_of(request), caller_of(request)
    if model == runtime.backbone_name:
        return json_response(_backbone_model(runtime))
    ref = TaskRef.parse(model, caller.tenant)
    authorize(caller, Action.READ, ref.tenant)
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
