"""The types of the trainer's answers, for the OpenAPI document. Knows no route and no store."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.web.answer_types import CLOSED, Time, Version
from trainer.jobs.record import State


class Dataset(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    dataset: Version
    tenant: str
    lines: Annotated[int, Field(ge=1)]
    bytes: int
    created_at: Time
    name: str | None


class DatasetList(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    datasets: list[Dataset]


class JobFailure(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    code: str
    message: str


class JobRecord(TypedDict):
    """``spec`` is what was asked for with everything filled in; ``progress`` and ``result`` fill as the job runs."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    id: str
    tenant: str
    spec: dict[str, Any]
    state: State
    attempt: Annotated[int, Field(ge=1)]
    created_at: Time
    queued_at: Time
    started_at: Time | None
    finished_at: Time | None
    cancel_requested: bool
    stage: str | None
    progress: dict[str, Any]
    failure: JobFailure | None
    version: Version | None
    result: dict[str, Any]


class JobList(TypedDict):
    """``next`` is the ``before`` of the next page, null on the last."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    jobs: list[JobRecord]
    next: str | None


class Ready(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    status: Literal["ready"]


class Backbones(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    backbones: Annotated[list[str], Field(min_length=1)]
