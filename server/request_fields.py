"""The field names that a request to this server may have, for guesses at misspelt ones. Knows no handler."""

from __future__ import annotations

from typing import Any, Final

from server.key_schemas import (
    BlockRequest,
    KeyRequest,
    KeysQuery,
    LimitsRequest,
    RotateRequest,
    ShareRequest,
    TenantRequest,
)
from server.openai.schemas import CompletionRequest
from server.schemas import (
    AuditQuery,
    BatchRequest,
    GcRequest,
    GenerateRequest,
    Parameters,
    PromoteRequest,
    RollbackRequest,
)
from server.usage_schemas import UsageQuery
from server.web.error_handlers import KnownFields, explain
from server.web.errors import InvalidRequest

FIELDS: Final[KnownFields] = {
    "parameters": frozenset(Parameters.model_fields),
    "/generate": frozenset(GenerateRequest.model_fields) | frozenset(Parameters.model_fields),
    "/generate/batch": frozenset(BatchRequest.model_fields) | frozenset(GenerateRequest.model_fields),
    "/v1/completions": frozenset(CompletionRequest.model_fields),
    "/audit": frozenset(AuditQuery.model_fields),
    "/admin/gc": frozenset(GcRequest.model_fields),
    "/keys": frozenset(KeyRequest.model_fields) | frozenset(KeysQuery.model_fields),
    "/tenants": frozenset(TenantRequest.model_fields),
    "/usage": frozenset(field.alias or name for name, field in UsageQuery.model_fields.items()),
    "": frozenset(
        name
        for body in (PromoteRequest, RollbackRequest, ShareRequest, RotateRequest, BlockRequest, LimitsRequest)
        for name in body.model_fields
    ),
}


def item_problems(error: Any) -> InvalidRequest:
    """The error for one invalid item of a batch, from its ``pydantic.ValidationError``."""
    return explain(error.errors(include_url=False, include_input=False, include_context=False), FIELDS, "/generate")
