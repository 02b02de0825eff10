"""The bodies and answers of ``/tenants``, ``/keys`` and a task's share: names and types. Ranges are the directory's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from typing_extensions import TypedDict

from prefixes.spec import NAME_PATTERN
from prefixes.tenancy.changes import MAX_KEY_NAME
from prefixes.tenancy.directory import GRACE_S, MAX_GRACE_S
from prefixes.tenancy.limits import DESCRIPTIONS, MAX_LIMIT
from prefixes.tenancy.model import WEIGHTS, Scope
from prefixes.tenancy.secret import ID_PATTERN, SECRET_PATTERN
from server.schemas import Name
from server.web.answer_types import CLOSED, Time
from server.web.strict_body import Body, whole

ScopeName = Annotated[str, Field(max_length=20), WithJsonSchema({"type": "string", "enum": sorted(Scope)})]
TenantName = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]
KeyName = Annotated[
    str,
    Field(max_length=1000),
    WithJsonSchema({"type": "string", "pattern": f"^[ -~]{{1,{MAX_KEY_NAME}}}$"}),
]
Moment = Annotated[str, Field(max_length=40), WithJsonSchema({"type": "string", "format": "date-time"})]


def _limits_schema(*, given: bool) -> dict[str, Any]:
    """Of an object with limits. In a request null takes one away."""
    value: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": MAX_LIMIT}
    one = {"anyOf": [value, {"type": "null"}]} if given else value
    properties = {name: {**one, "description": text} for name, text in DESCRIPTIONS.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _whole_values(value: Any) -> Any:
    return {name: whole(one) for name, one in value.items()} if isinstance(value, dict) else value


GivenLimits = Annotated[
    dict[str, int | None],
    BeforeValidator(_whole_values),
    Field(max_length=len(DESCRIPTIONS)),
    WithJsonSchema(_limits_schema(given=True)),
]
"""Names and ranges are the directory's to check."""
ShownLimits = Annotated[dict[str, int], WithJsonSchema(_limits_schema(given=False))]


class TenantRequest(Body):
    """``POST /tenants``."""

    name: Name


class BlockRequest(Body):
    """``POST /tenants/{tenant}/block``."""

    blocked: bool = Field(default=True, description="False lets its keys work again.")


class LimitsRequest(Body):
    """``POST /tenants/{tenant}/limits``."""

    weight: Annotated[float, Field(ge=WEIGHTS[0], le=WEIGHTS[1], allow_inf_nan=False)] | None = Field(
        default=None, description="Its share of a busy engine beside other tenants', which have 1 unless told."
    )
    limits: GivenLimits = Field(default={}, description="What changes; null gives one its default back.")


class KeyLimitsRequest(Body):
    """``POST /keys/{id}/limits``."""

    limits: GivenLimits = Field(description="What changes; null takes one away. The tenant's hold beside them.")


class KeyRequest(Body):
    """``POST /keys``."""

    name: KeyName = Field(description="For people; need not be unique.")
    scopes: list[ScopeName] = Field(min_length=1, max_length=len(Scope), description="What it may do.")
    tenant: Name | None = Field(default=None, description="Default: the caller's own.")
    expires_at: Moment | None = Field(default=None, description="When it ends by itself: ISO 8601 with its zone.")
    limits: GivenLimits = Field(default={}, description="Its own, beside those of its tenant.")


class KeysQuery(BaseModel):
    """``GET /keys?…``: text, therefore not strict."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: Name | None = None


class RotateRequest(Body):
    """``POST /keys/{id}/rotate``."""

    grace_s: Annotated[float, Field(ge=0, le=MAX_GRACE_S, allow_inf_nan=False)] = Field(
        default=GRACE_S, description="Seconds for which the secret before goes on working; 0 ends it now."
    )


class ShareRequest(Body):
    """``POST /prefixes/…/share``. Neither everyone nor tenants: private again."""

    everyone: bool = False
    tenants: list[Name] = Field(
        default=[], max_length=1000, description="Names, whether there are such tenants or not."
    )
    download: bool = Field(default=False, description="They may have the artifact too.")


class CallerLimits(TypedDict):
    """What holds now. One that is not named does not; where no key is needed none does."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    tenant: ShownLimits
    key: ShownLimits


class CallerRecord(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    tenant: TenantName
    key_id: Annotated[str, Field(pattern=ID_PATTERN)] | None
    scopes: list[ScopeName]
    limits: CallerLimits


class TenantRecord(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    name: TenantName
    blocked: bool
    weight: float
    limits: Annotated[ShownLimits, Field(description="Those that were set for it.")]
    limits_in_force: Annotated[ShownLimits, Field(description="Those and the defaults.")]
    created_at: Time
    created_by: str
    keys: Annotated[int, Field(description="Those that are not revoked.")]


class TenantList(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    tenants: list[TenantRecord]


class KeyRecord(TypedDict):
    """A key without its secrets."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    id: Annotated[str, Field(pattern=ID_PATTERN)]
    tenant: TenantName
    name: str
    scopes: list[ScopeName]
    limits: Annotated[ShownLimits, Field(description="Its own.")]
    limits_in_force: Annotated[ShownLimits, Field(description="Those and its tenant's, of each the smaller.")]
    created_at: Time
    created_by: str
    expires_at: Time | None
    revoked_at: Time | None
    last_used_at: Annotated[Time | None, Field(description="To the minute, noted twice a minute.")]


class KeyList(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    keys: list[KeyRecord]


class KeyWithSecret(KeyRecord):
    """The only answer that has the secret."""

    secret: Annotated[str, Field(pattern=SECRET_PATTERN)]


class Shared(TypedDict):
    """With whom a task is shared."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    everyone: bool
    tenants: list[TenantName]
    download: bool
