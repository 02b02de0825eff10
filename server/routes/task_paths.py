"""What the routes below ``/prefixes/{tenant}/{name}`` share: their two paths, their errors, and whose task it is about.

Every path exists with ``{tenant}`` and, for the caller's own tenant, without. Knows no route.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request

from prefixes.errors import InvalidName, RegistryFull, RegistryUnavailable, TaskNotFound
from prefixes.spec import NAME_PATTERN, check_name
from server.web.auth import Action, authorize, caller_of


def _in_path(*names: str) -> dict[str, Any]:
    """OpenAPI's description of the path parameters, for a handler that has two paths."""
    schema = {"type": "string", "pattern": NAME_PATTERN}
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]}


OWN, ANY = _in_path("name"), _in_path("tenant", "name")
FIND = (InvalidName, TaskNotFound, RegistryUnavailable)
CHANGE = (*FIND, RegistryFull)


def target(request: Request, action: Action) -> tuple[str, str]:
    """The tenant and name in the path, checked and authorized."""
    caller = caller_of(request)
    tenant = check_name("tenant", request.path_params.get("tenant", caller.tenant))
    name = check_name("task", request.path_params["name"])
    authorize(caller, action, tenant, name)
    return tenant, name
