"""``prefixd tenants create | list | limits | block``.

Owns these commands and their output. ``directory`` does their work, on a registry or through a server.
"""

from __future__ import annotations

from typing import Annotated

import typer

from prefixes.cli import show
from prefixes.cli.directory import opened_directory
from prefixes.cli.limit_options import NO_CHANGES, LimitChanges, show_limits, with_limit_options
from prefixes.cli.show import show_record
from prefixes.cli.target import JsonOption, RegistryOption, ServerOption, application, command

tenants_app = application("Make, list, limit and block tenants.")

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]


@command(tenants_app, "create")
def create(
    tenant: TenantArgument,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a tenant. `keys create` makes one as well."""
    with opened_directory(registry, server, create=True) as directory:
        show_record(directory.create_tenant(tenant), as_json)


@command(tenants_app, "list")
def list_tenants(
    registry: RegistryOption = None, server: ServerOption = None, as_json: JsonOption = False
) -> None:
    """List tenants and how many keys each has."""
    with opened_directory(registry, server) as directory:
        found = directory.tenants()
    if as_json:
        show.show_json({"tenants": found})
        return
    rows = [
        [
            tenant["name"], str(tenant["keys"]), f"{tenant['weight']:g}", "blocked" if tenant["blocked"] else "-",
            tenant["created_at"],
        ]
        for tenant in found
    ]  # fmt: skip
    show.show_table(["tenant", "keys", "weight", "state", "created"], rows)


@command(tenants_app, "limits")
@with_limit_options(unset=True)
def limits(
    tenant: TenantArgument,
    weight: Annotated[
        float | None,
        typer.Option(
            help="Its share of a busy engine beside the others', which have 1: with 2 twice the tokens of another, "
            "where both have work waiting."
        ),
    ] = None,
    limits: LimitChanges = NO_CHANGES,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set what a tenant may take, or show it, with the defaults that hold. A limit of 0 forbids."""
    changes = limits or weight is not None
    with opened_directory(registry, server) as directory:
        found = directory.limit_tenant(tenant, limits, weight) if changes else directory.tenant(tenant)
    show_limits(found, as_json)


@command(tenants_app, "block")
def block(
    tenant: TenantArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Let its keys work again.")] = False,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse all keys of a tenant with 403, on every replica within a second."""
    with opened_directory(registry, server) as directory:
        show_record(directory.block(tenant, not undo), as_json)
