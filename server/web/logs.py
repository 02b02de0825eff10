"""Logs: one JSON object per line on stderr.

Owns the form. Callers pass facts by ``extra={"facts": {...}}``, never prompts, outputs or secrets. Knows no service.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from prefixes.tenancy.secret import without_secrets

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)
"""The id of the HTTP request in whose context a line is written."""


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message", "request_id"?, **facts, "exception"?}``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id.get():
            line["request_id"] = request_id
        line.update(getattr(record, "facts", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(line, default=str))


def configure_logging(level: str) -> None:
    """Send every logger's lines of ``level`` and above through JsonFormatter to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in ("httpx", "httpcore", "numba", "asyncio", "filelock", "uvicorn", "transformers", "matplotlib", "saq"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
