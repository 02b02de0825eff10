"""The types of our own routes' answers, for the OpenAPI document.

Owns the shape of answers as ``answers``, ``registry.records`` and the routes make them; a document says nothing else.
Knows no route.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict

from prefixes.registry.transitions import ACTIONS
from prefixes.spec import Positions
from server.web.answer_types import CLOSED, Time, Version

TaskName = Annotated[str, Field(description="tenant/name")]
ItemError = Annotated[dict[str, Any], WithJsonSchema({"$ref": "#/components/schemas/Error"})]


class TopToken(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    token_id: int
    logprob: float


class TokenLogprob(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    token_id: int
    logprob: float
    top: list[TopToken]


class GeneratedOutput(TypedDict):
    """``score`` for beams, ``logprobs`` if asked for."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort"]
    score: NotRequired[float]
    logprobs: NotRequired[list[TokenLogprob]]


class GenerationUsage(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    input_tokens: int
    prefix_tokens: int
    output_tokens: int


class GenerationTiming(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    queue_ms: float
    time_to_first_token_ms: float | None
    total_ms: float


class Generated(TypedDict):
    """``task`` and ``version`` are null for the bare backbone. ``truncated`` is there if the input was cut."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    id: str
    task: TaskName | None
    version: Version | None
    outputs: Annotated[list[GeneratedOutput], Field(min_length=1)]
    usage: GenerationUsage
    timing: GenerationTiming
    truncated: NotRequired[Literal[True]]


class GeneratedBatch(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    items: list[Generated | ItemError]


class Published(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    task: TaskName
    version: Version
    aliases: dict[str, Version]
    size: int


class TaskLine(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    task: TaskName
    aliases: dict[str, Version]
    version: Version | None
    versions: int
    prefix_tokens: int | None
    resident: bool


class TaskList(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    prefixes: list[TaskLine]


class AliasMove(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    version: Version
    at: Time
    action: Annotated[str, WithJsonSchema({"type": "string", "enum": list(ACTIONS)})]


class SiteOfPrefix(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    length: int
    positions: Positions
    layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["float32", "float16", "bfloat16", "float64"]


class SpecOfPrefix(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    fingerprint: Version
    sites: dict[Literal["decoder", "encoder", "cross"], SiteOfPrefix]
    template: str
    defaults: dict[str, Any]
    origin: dict[str, Any]


class ReplacedEntry(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    entry: str
    value: Any
    at: Time


class PublishedVersion(TypedDict):
    """``replaced``: what entries of the record were before later uploads of the version, oldest first."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    version: Version
    size: int
    published_at: Time
    spec: SpecOfPrefix
    record: dict[str, Any]
    replaced: NotRequired[list[ReplacedEntry]]


class PublishKey(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    key: str
    version: Version


class Task(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    task: TaskName
    aliases: dict[str, Version]
    history: dict[str, list[AliasMove]]
    versions: list[PublishedVersion]
    once: list[PublishKey]


class Ready(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    status: Literal["ready"]
    backbone: str
    fingerprint: Version


class KeptPrefix(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    tenant: str
    version: Version
    bytes: NotRequired[int]


class KeptInTier(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    tier: Literal["device", "host", "disk"]
    bytes: int
    limit_bytes: int
    prefixes: list[KeptPrefix]


class Residents(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    staged_bytes: int
    tiers: list[KeptInTier]


class Change(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    at: Time
    actor: str
    action: str
    task: TaskName
    alias: str | None
    old: str | None
    new: str | None
    note: NotRequired[str]


class KeyChange(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    at: Time
    actor: str
    action: str
    what: Annotated[str, Field(description="The tenant, the key's id, or the task.")]
    detail: str


class Denied(TypedDict):
    """``key`` null: nobody's that is known. ``count`` above 1 sums up denials that came too fast to be written."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    at: Time
    key: str | None
    action: str
    route: Annotated[str, Field(description="Of the request; `job ID` where a job was refused.")]
    what: Annotated[str, Field(description="The task, where it is one's own or shared with one.")]
    reason: str
    request_id: str
    count: int


class Audit(TypedDict):
    """``entries`` are of tasks, ``changes`` of the tenant's keys and shares, ``denials`` of its callers."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    entries: list[Change]
    changes: list[KeyChange]
    denials: list[Denied]


class Cleaned(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    dry_run: bool
    tasks: list[TaskName]
    artifacts: list[str]
    freed_bytes: int
    failed: list[str]
