"""``/datasets``: uploads, lists and deletes the data of jobs. Each dataset is named by the digest of its content."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from prefixes.errors import Conflict, DiskFull, InvalidName, QuotaExceeded
from prefixes.spec import NAME_PATTERN, VERSION_PATTERN, check_name
from server.web.auth import Caller, tenant_asked
from server.web.errors import InvalidRequest
from server.web.openapi import BODY, answers
from server.web.responses import json_response
from server.web.strict_query import EACH_ONCE
from trainer.data.files import DatasetsUnavailable
from trainer.data.lines import FIELDS, InvalidData
from trainer.data.store import DatasetInfo, DatasetNotFound
from trainer.jobs.errors import JobStoreUnavailable
from trainer.service.answer_schemas import Dataset, DatasetList
from trainer.service.runtime import TrainerRuntime, allowed, runtime_of
from trainer.service.schemas import DatasetsQuery

CHUNK = 1 << 20
"""Bytes that are checked and written at a time, off the event loop."""

router = APIRouter(prefix="/datasets", tags=["datasets"], default_response_class=Response)

LINE = {
    "type": "object",
    "required": list(FIELDS),
    "additionalProperties": False,
    "properties": {field: {"type": "string", "pattern": r"\S"} for field in FIELDS},
}
LINES = {"type": "array", "minItems": 1, "items": LINE, "description": "One JSON object in each line."}
NAME = {"type": "string", "pattern": NAME_PATTERN}
UPLOAD = {
    "parameters": [{"name": "name", "in": "query", "schema": NAME, "description": "Shown in lists."}],
    "requestBody": {"required": True, "content": {"application/x-ndjson": {"schema": LINES}}},
}
DIGEST = Path(json_schema_extra={"pattern": VERSION_PATTERN})
FIND = (InvalidRequest, DatasetNotFound, DatasetsUnavailable)
UPLOADED = answers(
    Dataset, *BODY, InvalidName, InvalidData, QuotaExceeded, DiskFull, DatasetsUnavailable, status=201
)

LISTED = answers(DatasetList, InvalidName, InvalidRequest, DatasetsUnavailable)


@router.post("", status_code=201, summary="Upload a dataset", openapi_extra=UPLOAD, responses=UPLOADED)
async def upload(request: Request) -> Response:
    """JSONL of `{"input", "target"}`, the body as it is. The first bad line ends it: 422 names line and field.

    Nothing of it is read before the caller is allowed to and has one of the places for uploads.
    """
    runtime, caller = runtime_of(request), allowed(request)
    runtime.check_taking_work()
    kind = request.headers.get("content-type", "").lower()
    if kind.startswith("multipart/"):
        raise InvalidRequest("content-type: expected the JSONL as the body (curl --data-binary @FILE), got a form")
    name = request.query_params.get("name")
    if name is not None:
        check_name("dataset", name)
    async with runtime.uploads.place(request, caller.tenant):
        info = await _receive(request, runtime, caller, name)
    return json_response(_body(info), status=201)


@router.get("", summary="List datasets", dependencies=[EACH_ONCE], responses=LISTED)
async def datasets(request: Request, query: Annotated[DatasetsQuery, Query()]) -> Response:
    """The newest first: one's own tenant's; an operator's of all, or of `tenant`."""
    store, tenant = runtime_of(request).service.datasets, tenant_asked(allowed(request), query.tenant)
    listed = await asyncio.to_thread(store.list, tenant)
    return json_response({"datasets": [_body(info) for info in listed]})


@router.get("/{digest}", summary="What is known of a dataset", responses=answers(Dataset, InvalidName, *FIND))
async def dataset(
    request: Request, digest: Annotated[str, DIGEST], query: Annotated[DatasetsQuery, Query()]
) -> Response:
    """404 for none, and for another tenant's. An operator names the `tenant`."""
    store, tenant = runtime_of(request).service.datasets, _tenant(request, query)
    return json_response(_body(await asyncio.to_thread(store.info, tenant, _digest(digest))))


@router.delete(
    "/{digest}",
    status_code=204,
    summary="Delete a dataset",
    responses=answers(None, InvalidName, *FIND, Conflict, JobStoreUnavailable, status=204),
)
async def delete(
    request: Request, digest: Annotated[str, DIGEST], query: Annotated[DatasetsQuery, Query()]
) -> Response:
    """409 while a queued or running job needs it. An operator names the `tenant`."""
    service, tenant = runtime_of(request).service, _tenant(request, query)
    await service.delete_dataset(tenant, _digest(digest))
    return Response(status_code=204)


def _tenant(request: Request, query: DatasetsQuery) -> str:
    """The tenant whose dataset it is: two may have the same one."""
    caller = allowed(request)
    return tenant_asked(caller, query.tenant) or caller.tenant


async def _receive(request: Request, runtime: TrainerRuntime, caller: Caller, name: str | None) -> DatasetInfo:
    store, most = runtime.service.datasets, runtime.settings.max_dataset_bytes
    quota = runtime.service.quotas.dataset_bytes(caller.tenant, caller.key_id)
    with await asyncio.to_thread(store.begin, caller.tenant, max_bytes=most, name=name, quota=quota) as upload:
        async for chunk in _chunks(request):
            async with runtime.writing:
                await asyncio.to_thread(upload.write, chunk)
        allowed(request)  # still: it may have taken long
        async with runtime.writing:
            return await asyncio.to_thread(upload.finish)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    buffered = bytearray()
    async for piece in request.stream():
        buffered += piece
        if len(buffered) >= CHUNK:
            yield bytes(buffered)
            buffered.clear()
    if buffered:
        yield bytes(buffered)


def _digest(text: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        raise InvalidRequest("dataset: expected sha256: and 64 hexadecimal digits, as the upload was answered with")
    return text


def _body(info: DatasetInfo) -> dict[str, object]:
    told = {name: value for name, value in info.as_dict().items() if name != "digest"}
    return {"dataset": info.digest, "tenant": info.tenant, **told}
