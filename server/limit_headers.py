"""The headers that tell a caller how its limits stand, in OpenAI's forms. Owns their names and forms; counts nothing.

Of all limits on requests, or tokens, that a request is held against, they tell the tightest: the one with least left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.requests import Request

from prefixes.limiter.base import State, Window
from prefixes.limiter.charges import name_of
from server.web.errors import STATUSES
from server.web.openapi import Responses

COUNTERS: Final = ("requests", "tokens")
WARNING: Final = "x-prefixd-quota-warning"
WARNING_FROM: Final = 0.8
"""The part of a day's or month's quota from which on answers warn."""
_INTEGER: Final = {"type": "integer", "minimum": 0}
_DURATION: Final = {"type": "string", "pattern": "^((([0-9]+h)?[0-9]+m)?[0-9]+s|[0-9]+ms)$"}
_DOCUMENTED: Final[Mapping[str, Any]] = {
    **{
        f"x-ratelimit-{what}-{counter}": {"description": f"{words} of the tightest limit on {counter}.", "schema": form}
        for counter in COUNTERS
        for what, words, form in (
            ("limit", "The most", _INTEGER), ("remaining", "What is left", _INTEGER),
            ("reset", "The time until all is left", _DURATION),
        )
    },
    WARNING: {"description": "Quotas of a day or month that are nearly used up.", "schema": {"type": "string"}},
}  # fmt: skip
HEADERS: Final = tuple(_DOCUMENTED)


def told_of(request: Request) -> LimitHeaders:
    """What the answer to ``request`` will tell of limits, whatever it is."""
    headers: dict[str, str] = request.scope["state"].setdefault("answer_headers", {})
    return LimitHeaders(headers)


class LimitHeaders:
    """Calling it with the states of a request's limits puts their headers into ``headers``; the last call holds."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers

    def __call__(self, states: Sequence[State]) -> None:
        for name in HEADERS:
            self._headers.pop(name, None)
        self._headers.update(limit_headers(states))


def limit_headers(states: Sequence[State]) -> dict[str, str]:
    """The headers for these limits, none where there is no limit."""
    headers = {}
    for counter in COUNTERS:
        of_counter = [state for state in states if state.charge.counter == counter]
        if of_counter:
            tightest = min(of_counter, key=lambda state: state.remaining)
            headers[f"x-ratelimit-limit-{counter}"] = str(tightest.charge.limit)
            headers[f"x-ratelimit-remaining-{counter}"] = str(tightest.remaining)
            headers[f"x-ratelimit-reset-{counter}"] = duration(tightest.reset_s)
    if warnings := [warning for state in states if (warning := _warning(state))]:
        headers[WARNING] = ", ".join(warnings)
    return headers


def duration(seconds: float) -> str:
    """``17ms``, ``1s``, ``6m0s``, ``1h0m0s``; never shorter than ``seconds``."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, left = divmod(math.ceil(milliseconds / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{left}s" if hours else f"{minutes}m{left}s" if minutes else f"{left}s"


def documented(responses: Responses) -> Responses:
    """A route's ``responses=`` with these headers on what may carry them: a success, and each refusal by a limit."""
    for status in responses.keys() & {200, STATUSES["rate_limited"], STATUSES["quota_exceeded"]}:
        responses[status]["headers"] = {**responses[status].get("headers", {}), **_DOCUMENTED}
    return responses


def _warning(state: State) -> str | None:
    charge = state.charge
    if charge.window is Window.MINUTE or state.used < WARNING_FROM * charge.limit:
        return None
    whose = "key" if charge.key else "tenant"
    return f"{name_of(charge)} of the {whose}: {state.used} of {charge.limit} used"
