"""Errors over HTTP: stable codes, statuses, bodies.

Owns the mapping from PrefixdError codes to statuses and the two bodies: ours, and OpenAI's under ``/v1``. An answer
never quotes an unexpected exception: it says ``internal``, and the exception goes to the log. Nor does it quote the
secret of a key, wherever in a request that stood. Knows no route.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from prefixes.errors import PrefixdError
from prefixes.tenancy.secret import without_secrets

STATUSES: Final[Mapping[str, int]] = {
    "invalid_request": 422,
    "invalid_name": 422,
    "invalid_parameter": 422,
    "invalid_artifact": 422,
    "input_too_long": 422,
    "invalid_data": 422,
    "unauthorized": 401,
    "forbidden": 403,
    "quota_exceeded": 403,
    "not_found": 404,
    "task_not_found": 404,
    "key_not_found": 404,
    "dataset_not_found": 404,
    "job_not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "incompatible_prefix": 409,
    "conflict": 409,
    "limit_reached": 409,
    "body_too_large": 413,
    "queue_full": 429,
    "rate_limited": 429,
    "internal": 500,
    "engine_failure": 500,
    "backbone_error": 500,
    "registry_unavailable": 503,
    "shutting_down": 503,
    "not_ready": 503,
    "overloaded": 503,
    "datasets_unavailable": 503,
    "jobs_unavailable": 503,
    "disk_full": 507,
}
"""Every code that an answer can carry, and its status."""

REFUSALS: Final = frozenset({"unauthorized", "forbidden", "key_not_found"})
"""Codes of answers that refuse a caller because of who it is, wherever they are raised."""

RETRY_AFTER_S: Final[Mapping[str, float]] = {
    "queue_full": 1, "rate_limited": 1, "registry_unavailable": 1, "shutting_down": 5, "not_ready": 1,
    "overloaded": 1, "datasets_unavailable": 1, "jobs_unavailable": 1,
}


_log = logging.getLogger("prefixd.http")


class InvalidRequest(PrefixdError):
    """The request does not have the form that the route takes."""

    code = "invalid_request"


class Unauthorized(PrefixdError):
    """The request needs a key that works."""

    code = "unauthorized"


class Forbidden(PrefixdError):
    """The caller may not do this."""

    code = "forbidden"


class NotFound(PrefixdError):
    """There is no such route."""

    code = "not_found"


class MethodNotAllowed(PrefixdError):
    """The route does not take this method."""

    code = "method_not_allowed"


class BodyTooLarge(PrefixdError):
    """The request's body is larger than the server accepts."""

    code = "body_too_large"


class RequestTimeout(PrefixdError):
    """The request does not arrive."""

    code = "timeout"


class Overloaded(PrefixdError):
    """There are too many requests or connections at once."""

    code = "overloaded"


def status_of(error: PrefixdError) -> int:
    """The HTTP status for ``error``: 500 for a code that is not in ``STATUSES``."""
    return STATUSES.get(error.code, 500)


def internal_error() -> PrefixdError:
    """The error for an unexpected exception. It tells the caller nothing about it."""
    return PrefixdError("internal error; the request id finds it in the server's log")


def error_of(error: Exception) -> PrefixdError:
    """``error`` itself if it is a PrefixdError, else ``internal``, and the log gets the exception."""
    if isinstance(error, PrefixdError):
        return error
    _log.error("unexpected error", exc_info=error)
    return internal_error()


def error_body(error: PrefixdError, request_id: str | None) -> dict[str, Any]:
    """``{"code", "message", "detail", "request_id"}``, plain JSON values."""
    return {
        "code": error.code if error.code in STATUSES else "internal",
        "message": without_secrets(error.message),
        "detail": _plain(error.detail),
        "request_id": request_id,
    }


def openai_error_body(error: PrefixdError) -> dict[str, Any]:
    """OpenAI's form: ``{"message", "type", "param", "code"}``."""
    status = openai_status_of(error)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    parameter = error.detail.get("parameter")
    return {
        "message": without_secrets(error.message),
        "type": kind,
        "param": without_secrets(parameter) if isinstance(parameter, str) else None,
        "code": error.code if error.code in STATUSES else "internal",
    }


def openai_status_of(error: PrefixdError) -> int:
    """As ``status_of``, in OpenAI's terms."""
    return openai_status(status_of(error))


def openai_status(status: int) -> int:
    """400 instead of 422, as OpenAI's clients expect."""
    return 400 if status == 422 else status


def retry_helps(code: str) -> bool:
    """Whether an answer with ``code`` always carries Retry-After."""
    return code in RETRY_AFTER_S


def error_response(error: PrefixdError, request_id: str | None, *, openai: bool = False) -> Response:
    """The answer for ``error``, with Retry-After if a retry helps."""
    headers = {}
    after = error.detail.get("retry_after_s", RETRY_AFTER_S.get(error.code))
    if isinstance(after, (int, float)) and math.isfinite(after):
        headers["retry-after"] = str(max(1, math.ceil(after)))
    if error.code == Unauthorized.code:
        headers["www-authenticate"] = 'Bearer realm="prefixd"'
    body = openai_error_body(error) if openai else error_body(error, request_id)
    return Response(
        encode_error(body),
        status_code=openai_status_of(error) if openai else status_of(error),
        headers=headers,
        media_type="application/json",
    )


def encode_error(body: Mapping[str, Any]) -> bytes:
    """``{"error": body}`` as ASCII JSON, which can carry anything that a message quotes from a request."""
    return json.dumps({"error": body}).encode()


def _plain(value: Any) -> Any:
    """``value`` as plain JSON values."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {without_secrets(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return without_secrets(str(value))
