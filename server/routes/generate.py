"""``POST /generate`` and ``POST /generate/batch``. Owns a batch's items and a stream's events; knows no admission."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from prefixes.errors import (
    EngineFailure,
    IncompatiblePrefix,
    InputTooLong,
    InvalidName,
    InvalidParameter,
    NotReady,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    RegistryUnavailable,
    TaskNotFound,
)
from server.answer_schemas import Generated, GeneratedBatch
from server.answers import answer, token_body
from server.engine.types import Event, Failed, TokenEvent
from server.limit_headers import documented, told_of
from server.request_fields import item_problems
from server.reservations import Told
from server.runtime import Runtime, request_id_of, runtime_of
from server.schemas import BatchRequest, GenerateItem, GenerateRequest
from server.service import Running
from server.web.auth import Caller, caller_of
from server.web.errors import InvalidRequest, encode_error, error_body, error_of
from server.web.json_body import JsonRoute
from server.web.openapi import BODY, answers, events
from server.web.responses import json_response, to_json
from server.web.sse import EventStreamResponse, event, unless_disconnected, until_disconnect

router = APIRouter(tags=["generate"], default_response_class=Response, route_class=JsonRoute)

ERRORS = (
    *BODY, InvalidName, InvalidParameter, InputTooLong, TaskNotFound, IncompatiblePrefix, QueueFull, RateLimited,
    QuotaExceeded, EngineFailure, RegistryUnavailable, NotReady,
)  # fmt: skip


@router.post(
    "/generate",
    summary="Generate text for a task, or from the bare backbone",
    responses=documented(answers(Generated, *ERRORS, content=events("token", "done", "error"))),
)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """One answer as JSON, or a stream of `token` events ended by one `done` or one `error`."""
    runtime, request_id = runtime_of(request), request_id_of(request)
    admission = runtime.service.admit(
        caller_of(request), body.task, body.input, body.parameters.given(), request_id, told_of(request)
    )
    running: Running = await unless_disconnected(request.receive, admission)
    if body.stream:
        return EventStreamResponse(
            _events(running, request_id), abort=running.stream.abort, heartbeat_s=runtime.settings.heartbeat_s
        )
    finished = await until_disconnect(request.receive, running.stream.result(), running.stream.abort)
    return json_response(answer(running.identity, finished))


@router.post(
    "/generate/batch",
    summary="Generate for many items, each its own task",
    responses=documented(answers(GeneratedBatch, *BODY, NotReady)),
)
async def generate_batch(body: BatchRequest, request: Request) -> Response:
    """`{"items": [...]}` in the order asked, each an answer or `{"error": ...}`; a bad item never harms others.

    Each is a request of its own for limits; the headers are those of the last one.
    """
    runtime = runtime_of(request)
    runtime.check_taking_work()
    most = runtime.settings.max_batch_items
    if len(body.items) > most:
        raise InvalidRequest(
            f"items: expected at most {most}, got {len(body.items)}", expected=most, got=len(body.items)
        )
    batch = _Batch(runtime, caller_of(request), request_id_of(request), told_of(request))
    items = await until_disconnect(request.receive, batch.run(body.items), batch.abort)
    return Response(b'{"items":[' + b",".join(items) + b"]}", media_type="application/json")


class _Batch:
    """The items of one batch while they run. An item that the queue has no room for waits until another of them ends.

    Each answer is encoded by itself: one that cannot be is its own item's error.
    """

    def __init__(self, runtime: Runtime, caller: Caller, request_id: str, told: Told) -> None:
        self._runtime = runtime
        self._caller, self._told = caller, told
        self._request_id = request_id
        self._running: set[asyncio.Task[None]] = set()
        self._streams: dict[int, Running] = {}
        self._answers: dict[int, bytes] = {}
        self._admitting = anyio.CancelScope()

    async def run(self, items: list[Any]) -> list[bytes]:
        """Submit the items in order and collect what becomes of each, as JSON."""
        with self._admitting:
            for index, item in enumerate(items):
                try:
                    self._streams[index] = await self._admit(index, item)
                except Exception as error:
                    self._fail(index, error)
                    continue
                task = asyncio.create_task(self._finish(index))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
        while self._running:
            await asyncio.wait(self._running)
        return [self._answers.get(index, b"{}") for index in range(len(items))]

    def abort(self) -> None:
        """Abort all items: nobody waits for them any more."""
        self._admitting.cancel()
        for running in self._streams.values():
            running.stream.abort()

    async def _admit(self, index: int, item: Any) -> Running:
        try:
            body = GenerateItem.model_validate(item)
        except ValidationError as error:
            raise item_problems(error) from None
        service = self._runtime.service
        prepared = await service.prepare(
            self._caller, body.task, body.input, body.parameters.given(), f"{self._request_id}-{index}"
        )
        with await service.reserve(self._caller, [prepared], self._told) as reservation:
            while True:
                try:
                    return service.submit(prepared, reservation)
                except QueueFull:
                    if not self._running:
                        raise
                    await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)

    async def _finish(self, index: int) -> None:
        running = self._streams[index]
        try:
            self._answers[index] = to_json(answer(running.identity, await running.stream.result()))
        except Exception as error:
            self._fail(index, error)
        finally:
            del self._streams[index]

    def _fail(self, index: int, error: Exception) -> None:
        self._answers[index] = encode_error(error_body(error_of(error), self._request_id))


async def _events(running: Running, request_id: str) -> AsyncIterator[bytes]:
    """The stream's pieces, each with all events that are ready. What cannot be encoded ends it with an error."""
    stream = running.stream
    async for first in stream:
        pieces = []
        for got in (first, *stream.take_ready()):
            try:
                pieces.append(_encoded(running, got, request_id))
            except Exception as error:
                stream.abort()
                pieces.append(_error_event(error, request_id))
                yield b"".join(pieces)
                return
        if any(pieces):
            yield b"".join(pieces)


def _encoded(running: Running, got: Event, request_id: str) -> bytes:
    """One event; nothing for a token of a beam search, whose outputs are known at its end."""
    if isinstance(got, TokenEvent):
        return b"" if running.params.num_beams > 1 else event("token", to_json(token_body(got)))
    if isinstance(got, Failed):
        return _error_event(got.error, request_id)
    return event("done", to_json(answer(running.identity, got)))


def _error_event(error: Exception, request_id: str) -> bytes:
    return event("error", encode_error(error_body(error_of(error), request_id)))
