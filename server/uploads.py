"""``POST /prefixes``: reads the multipart body of an upload, and the artifact in it.

Owns the form's fields and their checks, and the check that the artifact can serve on this backbone and in this engine.
The file stays on disk (spooled) until its turn to be read. Knows no registry.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from prefixes.artifact import read_prefix
from prefixes.backbone import Backbone
from prefixes.errors import NO_ROOM, DiskFull, InputTooLong, InvalidArtifact, InvalidParameter, NotReady
from prefixes.registry.limits import NOTE
from prefixes.spec import (
    DEFAULT_ALIAS,
    NAME_PATTERN,
    TASK_PATTERN,
    VERSION_PATTERN,
    TaskRef,
    check_compatible,
    check_name,
    check_version,
)
from prefixes.strict_json import strict_json
from server.engine.async_engine import AsyncEngine
from server.parameters import ParameterLimits, check_defaults
from server.web.auth import Caller
from server.web.errors import InvalidRequest
from server.web.suggest import did_you_mean

FORM: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["task", "file"],
    "additionalProperties": False,
    "properties": {
        "task": {"type": "string", "pattern": TASK_PATTERN},
        "file": {"type": "string", "format": "binary"},
        "alias": {
            "anyOf": [{"type": "string", "pattern": NAME_PATTERN}, {"type": "string", "const": ""}],
            "default": DEFAULT_ALIAS,
            "description": "The alias that moves; none moves if it is empty.",
        },
        "expected_current": {
            "anyOf": [{"type": "string", "pattern": VERSION_PATTERN}, {"type": "string", "const": ""}],
            "description": "Refuse unless the alias points here, or if this is empty unless there is no such alias.",
        },
        "record": {"type": "object", "description": "A JSON object, as text."},
        "once": {
            "type": "string",
            "pattern": NAME_PATTERN,
            "description": "A publish key: a later upload with the same one changes nothing.",
        },
        "note": {"type": "string", "pattern": NOTE, "description": "Why, a line for the audit."},
    },
}
"""The form, for the document."""
FIELDS: Final = frozenset(FORM["properties"])


@dataclass(frozen=True)
class Upload:
    """A well-formed upload. ``alias`` None moves no alias. ``idempotency_key`` is the form's field ``once``."""

    tenant: str
    name: str
    alias: str | None
    expected_current: str | None
    record: dict[str, Any]
    idempotency_key: str | None
    note: str | None
    file: UploadFile


@asynccontextmanager
async def read_upload(request: Request, caller: Caller) -> AsyncIterator[Upload]:
    """The form of an upload. Its temporary file is removed afterwards.

    Raises InvalidRequest, InvalidName, DiskFull, NotReady.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequest("content-type: expected multipart/form-data with the fields task and file")
    form = await _form(request)
    try:
        for field, _ in form.multi_items():
            if field not in FIELDS:
                raise InvalidRequest(f"{field[:80]}: unknown field{did_you_mean(field[:80], FIELDS)}")
            if len(form.getlist(field)) > 1:
                raise InvalidRequest(f"{field}: expected once, got {len(form.getlist(field))} times")
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("file: expected the artifact as a file part")
        ref = TaskRef.parse(_text(form.get("task"), "task"), caller.tenant)
        if "@" in _text(form.get("task"), "task"):
            raise InvalidRequest("task: expected [tenant/]name; alias has its own field")
        alias = _text(form.get("alias", DEFAULT_ALIAS), "alias")
        if alias:
            check_name("alias", alias)
        expected = _text(form.get("expected_current"), "expected_current") if "expected_current" in form else None
        if expected:
            check_version(expected)
        record = _record(_text(form.get("record", ""), "record"))
        key = check_name("publish key", _text(form.get("once"), "once")) if "once" in form else None
        note = _text(form.get("note"), "note") if "note" in form else None
        yield Upload(ref.tenant, ref.name, alias or None, expected, record, key, note, file)
    finally:
        await form.close()


async def _form(request: Request) -> FormData:
    try:
        return await request.form(max_files=1, max_fields=8)
    except UnicodeError:
        raise InvalidRequest("content-type: expected a form in UTF-8, got a charset that cannot be read") from None
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"expected room for the upload in the temporary folder, got: {error.strerror}") from error
        raise NotReady("the upload cannot be kept in the temporary folder") from error


def validate_upload(data: bytes, backbone: Backbone, limits: ParameterLimits, engine: AsyncEngine) -> None:
    """Check that the artifact in ``data`` is complete, finite, made for ``backbone``, and that it can serve here.

    Raises InvalidArtifact, IncompatiblePrefix.
    """
    spec = read_prefix(data).spec
    check_compatible(spec, backbone.spec)
    try:
        check_defaults(spec.defaults, backbone.generation_defaults, limits)
    except InvalidParameter as error:
        raise InvalidArtifact(f"defaults: {error.message}", **error.detail) from None
    shortest = backbone.prompt_encoder.encode(spec.template, "") or [0]  # any one token
    try:
        engine.check_prefix(spec, tuple(shortest))
    except InputTooLong as error:
        raise InvalidArtifact(
            f"not even the shortest request with this prefix fits: {error.message}", **error.detail
        ) from None


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{field}: expected text, got {'a file' if value is not None else 'nothing'}")
    return value


def _record(text: str) -> dict[str, Any]:
    try:
        record = strict_json(text) if text else {}
    except ValueError as error:
        raise InvalidRequest(f"record: expected a JSON object, got {str(error)[:200]}") from None
    if not isinstance(record, dict):
        raise InvalidRequest(f"record: expected a JSON object, got {type(record).__name__}")
    return record
