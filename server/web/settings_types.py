"""Types that several services' settings share: counts, seconds, comma-separated lists. Knows no setting."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1, le=1 << 31)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]

COMMA_SEPARATED = BeforeValidator(_split_commas)
"""For a tuple. With pydantic_settings.NoDecode beside it, a variable's text is not parsed as JSON."""

Names = Annotated[tuple[str, ...], NoDecode, COMMA_SEPARATED]
