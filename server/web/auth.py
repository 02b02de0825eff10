"""The one place that decides who may do what.

Owns callers, actions and the decision. Every route that acts for a tenant asks here first; the admin port does not.
There are no API keys yet: every caller is the tenant ``default`` and may do everything, to its own tenant's tasks and
to others'.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from starlette.requests import HTTPConnection

from prefixes.spec import DEFAULT_TENANT
from server.web.errors import Forbidden


class Action(StrEnum):
    """What a caller asks to do with a tenant's tasks, or with the bare backbone (tenant None)."""

    GENERATE = "generate"
    READ = "read"  # list, inspect, download
    PUBLISH = "publish"
    PROMOTE = "promote"  # and roll back
    DELETE = "delete"  # and undelete
    TRAIN = "train"  # datasets and jobs


@dataclass(frozen=True)
class Caller:
    """Who asks. Names without a tenant belong to ``tenant``."""

    tenant: str

    @property
    def actor(self) -> str:
        """The caller's name in the registry's audit."""
        return f"tenant:{self.tenant}"


def caller_of(connection: HTTPConnection) -> Caller:
    """The caller behind a request. Without API keys everyone is the default tenant."""
    return Caller(DEFAULT_TENANT)


def authorize(caller: Caller, action: Action, tenant: str | None) -> None:
    """Return if ``caller`` may do ``action`` to ``tenant``'s tasks (None: the bare backbone), else raise Forbidden.

    The body is empty: there are no API keys, so that nothing is forbidden to anybody.
    """


def may(caller: Caller, action: Action, tenant: str | None) -> bool:
    """Whether ``authorize`` would return, for lists."""
    try:
        authorize(caller, action, tenant)
    except Forbidden:
        return False
    return True
