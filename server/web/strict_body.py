"""The base of every JSON body that a service takes: strict types, no unknown field. Knows no field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

_EXACT = 1 << 53  # up to here a float that is whole is one integer


class Body(BaseModel):
    """Takes no string for a number and no number for a boolean. 4.0 is the integer 4, as JSON Schema has it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return whole(value)


def whole(value: Any) -> Any:
    """The integer that a float is, if it is one; else ``value``."""
    integer = isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT
    return int(value) if integer else value
