"""``prefixd keys create | list | show | limits | rotate | revoke | new-secret``.

Owns these commands and their output. ``directory`` does their work, on a registry or through a server.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixes.cli import show
from prefixes.cli.directory import opened_directory
from prefixes.cli.durations import seconds_of
from prefixes.cli.limit_options import NO_CHANGES, LimitChanges, show_limits, tell_held, with_limit_options
from prefixes.cli.show import show_record
from prefixes.cli.target import JsonOption, RegistryOption, ServerOption, application, command
from prefixes.tenancy.directory import shown, utc_now
from prefixes.tenancy.hash_file import write_new
from prefixes.tenancy.model import InvalidKey, Scope
from prefixes.tenancy.secret import hash_line, new_id, new_secret, parse_secret

keys_app = application("Make, rotate and revoke the keys that callers of a server or trainer need.")

KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `list` shows it.")]


@command(keys_app, "create")
@with_limit_options(unset=False)
def create(
    scopes: Annotated[str, typer.Option(metavar="LIST", help=f"What it may do, with commas: {', '.join(Scope)}.")],
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose it is; default: `default`, or on a server your own.")
    ] = None,
    name: Annotated[str, typer.Option(help="For people; need not be unique.")] = "key",
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="When it ends: 30d, 12h, or 2030-01-31T00:00:00Z.")
    ] = None,
    limits: LimitChanges = NO_CHANGES,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key, and its tenant if that is new. The secret is shown once.

    The first key of a registry closes it for good: its servers and trainers need keys from then on. On a server it
    takes a key with the scope `keys`, or an operator's.
    """
    end = None if expires is None else _end(expires)
    with opened_directory(registry, server, create=True) as directory:
        given = [one.strip() for one in scopes.split(",") if one.strip()]
        made = directory.create_key(tenant, name, given, end, limits)
    _show_secret(made, as_json)


@command(keys_app, "list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only this tenant's.")] = None,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """List keys, the oldest first, revoked ones too."""
    with opened_directory(registry, server) as directory:
        found = directory.keys(tenant)
    if as_json:
        show.show_json({"keys": found})
        return
    headings = ["id", "tenant", "name", "scopes", "state", "last used"]
    rows = [
        [key["id"], key["tenant"], key["name"], ",".join(key["scopes"]), _state(key), key["last_used_at"] or "-"]
        for key in found
    ]
    show.show_table(headings, rows)


@command(keys_app, "show")
def show_key(
    key_id: KeyArgument, registry: RegistryOption = None, server: ServerOption = None, as_json: JsonOption = False
) -> None:
    """Show a key: everything but its secret."""
    with opened_directory(registry, server) as directory:
        show_record(directory.key(key_id), as_json)


@command(keys_app, "limits")
@with_limit_options(unset=True)
def limits(
    key_id: KeyArgument,
    limits: LimitChanges = NO_CHANGES,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set what a key may take, or show it. Its tenant's limits hold as well. A limit of 0 forbids."""
    with opened_directory(registry, server) as directory:
        key = directory.limit_key(key_id, limits) if limits else directory.key(key_id)
    show_limits(key, as_json)
    tell_held(key)


@command(keys_app, "rotate")
def rotate(
    key_id: KeyArgument,
    grace: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the secret before goes on working: 24h, 30m, 0s.")
    ] = "24h",
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a key a new secret. Its id and scopes stay, and the old secret works a while, so that nobody is cut off."""
    seconds = seconds_of("--grace", grace)
    with opened_directory(registry, server) as directory:
        made = directory.rotate(key_id, seconds)
    _show_secret(made, as_json)


@command(keys_app, "revoke")
def revoke(
    key_id: KeyArgument, registry: RegistryOption = None, server: ServerOption = None, as_json: JsonOption = False
) -> None:
    """End a key for good, on every replica within a second."""
    with opened_directory(registry, server) as directory:
        show_record(directory.revoke(key_id), as_json)


@command(keys_app, "new-secret")
def new_secret_files(
    secret_file: Annotated[Path, typer.Option("--secret-file", help="A new file for the secret, for its owner alone.")],
    hash_file: Annotated[Path, typer.Option("--hash-file", help="A new file for its id and SHA-256, for services.")],
) -> None:
    """Make a secret without a registry: servers started with --operator-hash-file make an operator's key of it."""
    secret = new_secret(new_id())
    presented = parse_secret(secret)
    assert presented is not None
    write_new(secret_file, secret + "\n", 0o600)
    try:
        write_new(hash_file, hash_line(presented), 0o644)
    except InvalidKey:
        secret_file.unlink()  # it would be in the way of the next try, and no service knows it
        raise
    typer.echo(f"wrote {secret_file} and {hash_file}: key {presented.key_id}")


def _end(text: str) -> str:
    if re.fullmatch(r"[\d.]+\s*[smhd]", text):
        return shown(datetime.now(UTC) + timedelta(seconds=seconds_of("--expires", text)))
    return text


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"]:
        return f"revoked {key['revoked_at'][:10]}"
    if not key["expires_at"]:
        return "works"
    return f"{'until' if key['expires_at'] > utc_now() else 'expired'} {key['expires_at']}"


def _show_secret(made: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show.show_json(made)
        return
    typer.echo(f"key {made['id']} of tenant {made['tenant']}: {', '.join(made['scopes'])}", err=True)
    typer.echo("Its secret, which is not shown again:", err=True)
    typer.echo(made["secret"])
    tell_held(made)
