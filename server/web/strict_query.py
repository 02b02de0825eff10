"""What holds for the query of every list: each parameter once, and none that is not known.

Owns the first, which no model can see: FastAPI gives it the last of several. Models with ``extra="forbid"`` do the
second; here is the one without parameters. Knows no route.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from fastapi import Depends
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from server.web.errors import InvalidRequest


class NoQuery(BaseModel):
    """The query of a list that takes none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


async def _each_once(request: Request) -> None:
    """Raise InvalidRequest for a parameter that comes twice."""
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if times > 1:
            problem, field = f"expected it once, got it {times} times", name[:80]
            raise InvalidRequest(
                f"{field}: {problem}", problems=[{"field": field, "problem": problem}], parameter=field
            )


EACH_ONCE: Final = Depends(_each_once)
