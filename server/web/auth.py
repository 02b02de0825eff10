"""The one place that decides who may do what.

Owns callers, actions and the decision, which takes nothing but these. Every route that acts asks here first. Who a
caller is has been found out before (``authentication``). Knows no registry.

Someone else's task that is not shared does not exist: every action on it ends like one on a name that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from starlette.requests import HTTPConnection

from prefixes.errors import TaskNotFound
from prefixes.spec import DEFAULT_TENANT, check_name
from prefixes.tenancy.model import Scope, Share
from server.web.denials import note_refused
from server.web.errors import Forbidden
from server.web.logs import current_request_id


class Action(StrEnum):
    """What a caller asks to do: with a task, with its own tenant, or (the last two) with the service."""

    GENERATE = "generate"
    READ = "read"  # lists
    INSPECT = "inspect"  # a task's card
    DOWNLOAD = "download"
    PUBLISH = "publish"
    PROMOTE = "promote"  # and roll back
    SHARE = "share"
    DELETE = "delete"  # and undelete
    TRAIN = "train"  # datasets and jobs
    KEYS = "keys"
    METRICS = "metrics"
    OPERATE = "operate"


SCOPES: Final[Mapping[Action, frozenset[Scope]]] = {
    Action.GENERATE: frozenset({Scope.GENERATE}),
    Action.READ: frozenset({Scope.READ}),
    Action.INSPECT: frozenset({Scope.READ, Scope.PUBLISH, Scope.DELETE}),  # who changes a task sees what it changes
    Action.DOWNLOAD: frozenset({Scope.READ}),
    Action.PUBLISH: frozenset({Scope.PUBLISH}),
    Action.PROMOTE: frozenset({Scope.PUBLISH}),
    Action.SHARE: frozenset({Scope.PUBLISH}),
    Action.DELETE: frozenset({Scope.DELETE}),
    Action.TRAIN: frozenset({Scope.TRAIN}),
    Action.KEYS: frozenset({Scope.KEYS}),
    Action.METRICS: frozenset({Scope.METRICS}),
    Action.OPERATE: frozenset({Scope.OPERATOR}),
}
"""The scopes of which each action takes one; ``operator`` may do everything."""
SHARED: Final = frozenset({Action.GENERATE, Action.READ, Action.INSPECT})
"""What a share allows; ``download`` comes with it only where the owner says so."""


@dataclass(frozen=True)
class Caller:
    """Who asks. Names without a tenant belong to ``tenant``.

    ``key_id`` is None where nobody needs a key. ``shares`` are those of the whole registry when the key was looked at.
    """

    tenant: str
    key_id: str | None = None
    scopes: frozenset[Scope] = frozenset(Scope)
    shares: Mapping[str, Share] = field(default_factory=dict, repr=False, compare=False)

    @property
    def actor(self) -> str:
        """The caller's name in the registry's audit, with the request that it acts by."""
        key = "" if self.key_id is None else f"/key:{self.key_id}"
        request = current_request_id.get()
        return f"tenant:{self.tenant}{key}" + (f"/request:{request}" if request else "")

    @property
    def operates(self) -> bool:
        """Whether it may do everything."""
        return Scope.OPERATOR in self.scopes


ANYBODY: Final = Caller(DEFAULT_TENANT)
"""The caller of a service that needs no keys: everyone is the default tenant and may do everything."""


def caller_of(connection: HTTPConnection) -> Caller:
    """The caller behind a request, as ``authentication`` judges it now: since the request began its key may have ended.

    Raises Unauthorized, Forbidden, RegistryUnavailable. So a route asks when it is about to act, its body being whole.
    """
    judge: Callable[[], Caller] = connection.state.judge
    return judge()


def authorize(caller: Caller, action: Action, tenant: str | None, name: str | None = None) -> None:
    """Return if ``caller`` may do ``action`` to ``tenant``'s task ``name``.

    Without a name it is about the tenant itself, with tenant None about the bare backbone or the service. Raises
    TaskNotFound for a task that the caller may not know of, Forbidden for what its key lacks. The audit gets a note of
    either, which names no task that the caller may not know of.
    """
    try:
        _decide(caller, action, tenant, name)
    except TaskNotFound as error:
        note_refused(action.value, "", error.code)
        raise
    except Forbidden as error:
        note_refused(action.value, "" if name is None else f"{tenant}/{name}", error.message)
        raise


def _decide(caller: Caller, action: Action, tenant: str | None, name: str | None) -> None:
    if caller.operates:
        return
    if tenant not in (None, caller.tenant):
        share = caller.shares.get(f"{tenant}/{name}") if name is not None else None
        if share is None or not share.reaches(caller.tenant):
            raise TaskNotFound(f"task {tenant}/{name}: expected a published task, found none", task=f"{tenant}/{name}")
        if action not in SHARED and not (action is Action.DOWNLOAD and share.download):
            raise Forbidden(f"task {tenant}/{name}: it is shared, and its owner does not let others {action.value} it")
    if not SCOPES[action] & caller.scopes:
        wanted, got = " or ".join(sorted(SCOPES[action])), ", ".join(sorted(caller.scopes))
        raise Forbidden(f"{action.value}: expected a key with the scope {wanted}, got one with {got}")


def tenant_asked(caller: Caller, named: str | None) -> str | None:
    """The tenant that a request is about: the caller's, or for an operator the one that it names, None for all.

    Raises InvalidName, and Forbidden for another's, whether or not it exists.
    """
    if named is not None and check_name("tenant", named) != caller.tenant and not caller.operates:
        raise Forbidden(f"tenant: expected one's own, {caller.tenant}, or an operator's key")
    return named if caller.operates else caller.tenant


def may(caller: Caller, action: Action, tenant: str | None, name: str | None = None) -> bool:
    """Whether ``authorize`` would return, for lists."""
    try:
        _decide(caller, action, tenant, name)
    except (Forbidden, TaskNotFound):
        return False
    return True
