"""The types of answers that every service gives, for the OpenAPI documents. Knows no route."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from prefixes.spec import VERSION_PATTERN

CLOSED = ConfigDict(extra="forbid")
Version = Annotated[str, Field(pattern=VERSION_PATTERN)]
Time = Annotated[str, Field(description="UTC, ISO 8601")]


class Alive(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    status: Literal["ok"]
