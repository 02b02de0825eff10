"""What every command shares: where it works (a registry or a server), how it names tasks, how it fails.

Owns the common options and the exit codes: 0; 1 for an error, told in one line on stderr; 2 for wrong usage.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from prefixes.cli.key_option import check_key_has_server, key_of_command, take_key, with_key
from prefixes.errors import PrefixdError, RegistryUnavailable, TaskNotFound
from prefixes.registry import URL_FORMS, default_registry_url, open_registry, shown_url
from prefixes.spec import DEFAULT_TENANT, TaskRef
from prefixes.tenancy.secret import without_secrets

if TYPE_CHECKING:
    from prefixes.backbone import Backbone
    from prefixes.registry.base import Registry, Store

P = ParamSpec("P")

RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL",
        help=f"The registry: {URL_FORMS}. [env: PREFIXD_REGISTRY] [default: ~/.local/share/prefixd/registry]",
        show_default=False,
    ),
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Work through a running server instead, for example http://localhost:8000. [env: PREFIXD_SERVER; "
        "PREFIXD_KEY for its key]",
        show_default=False,
    ),
]
NoServerOption = Annotated[str | None, typer.Option("--server", hidden=True)]  # gives an error that says why not
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="[TENANT/]NAME", show_default=False)]
RefArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="[TENANT/]NAME, with @ALIAS or @sha256:… for another version than production's; the digest may be "
        "shortened.",
        show_default=False,
    ),
]
AliasOption = Annotated[str, typer.Option("--alias", help="The alias to move.")]
ExpectedOption = Annotated[
    str | None,
    typer.Option(
        "--expected-current", metavar="VERSION", help="Fail unless the alias points here now.", show_default=False
    ),
]


def application(help_text: str) -> typer.Typer:
    """A typer application with the settings that all our commands share."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Turn errors of the library and the system into one line on stderr and exit code 1, never a traceback."""
    try:
        yield
    except (PrefixdError, OSError) as error:
        message = error.message if isinstance(error, PrefixdError) else _reason(error)
        typer.echo(f"error: {without_secrets(message)}", err=True)
        raise typer.Exit(1) from None


def command(
    app: typer.Typer, name: str, *, errors: Callable[[], AbstractContextManager[None]] = errors_in_a_line
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a command that runs within ``errors``, which decides what an error looks like."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            with errors():
                take_key(kwargs)
                function(*args, **kwargs)

        with_key(function, guarded)
        app.command(name)(guarded)
        return guarded

    return register


def place_of(registry: str | None, server: str | None) -> tuple[str, str | None]:
    """The registry's URL and the server's, if it is that: by the options, else the environment, else the default.

    Raises BadParameter for both, and for ``--key`` without a server.
    """
    if registry is None and server is None:
        registry, server = os.environ.get("PREFIXD_REGISTRY") or None, os.environ.get("PREFIXD_SERVER") or None
    if registry is not None and server is not None:
        raise typer.BadParameter("expected one of --registry and --server, got both")
    check_key_has_server(server)
    return registry or default_registry_url(), server


@contextmanager
def opened(registry: str | None, server: str | None, *, create: bool = False) -> Iterator[Registry]:
    """The registry that the options name, else the one that the environment names, else the default.

    ``create`` makes a missing registry, for commands that write. Raises as ``place_of``.
    """
    registry, server = place_of(registry, server)
    if server is not None:
        from prefixes.client import RemoteRegistry

        found: Registry = RemoteRegistry(server, api_key=key_of_command())
    else:
        with telling(registry) as url:
            found = open_registry(url, create=create)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def opened_store(registry: str | None, server: str | None) -> Iterator[Store]:
    """The registry itself, which must exist, for commands that no server offers. Raises BadParameter for a server."""
    if server is not None:
        raise typer.BadParameter("--server: this command works on the registry itself; give --registry")
    with telling(store_url(registry)) as url:
        found = open_registry(url, create=False)
    try:
        yield found
    finally:
        found.close()


def store_url(registry: str | None) -> str:
    """The URL of the registry that the option or the environment names, else the default. BadParameter for a server."""
    url = registry or os.environ.get("PREFIXD_REGISTRY") or None
    if url is None and os.environ.get("PREFIXD_SERVER"):
        raise typer.BadParameter("PREFIXD_SERVER: this command works on the registry itself; give --registry")
    return checked_url(url or default_registry_url())


def checked_url(url: str) -> str:
    """Return ``url``, or raise BadParameter if it is a server's."""
    if url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"expected a registry ({URL_FORMS}), not a server's URL: {url!r}")
    return url


@contextmanager
def telling(url: str) -> Iterator[str]:
    """Add the registry's URL to the error. The library leaves it out, because a server would tell its callers."""
    try:
        yield url
    except RegistryUnavailable as error:
        with suppress(RegistryUnavailable):  # `url` is no URL, and the error says so already
            error.message = f"{error.message} ({shown_url(url)})"
        raise


def task_of(text: str, registry: Registry | None = None) -> TaskRef:
    """The task that ``text`` names, without version or alias, for commands on all of its versions.

    Without a tenant it is the one's as whom ``registry``, if it is a server, knows the caller.
    """
    if "@" in text:
        raise typer.BadParameter(f"expected [TENANT/]NAME without a version or an alias, got {text!r}")
    return TaskRef.parse(text, _own_tenant(text, registry))


def reference(text: str, registry: Registry) -> TaskRef:
    """The reference that ``text`` means. Completes a shortened digest. Raises TaskNotFound, InvalidName."""
    name, _, selector = text.partition("@")
    digits = selector.removeprefix("sha256:")
    own = _own_tenant(name, registry)
    if not selector.startswith("sha256:") or not 4 <= len(digits) < 64:
        return TaskRef.parse(text, own)
    task = TaskRef.parse(name, own)
    versions = [info.version for info in registry.inspect(task.tenant, task.name).versions]
    found = [version for version in versions if version.startswith(selector)]
    if len(found) != 1:
        raise TaskNotFound(f"task {task.task}: {selector}: expected one version that begins so, found {len(found)}")
    return TaskRef(task.tenant, task.name, None, found[0])


def _own_tenant(text: str, registry: Registry | None) -> str:
    from prefixes.client import RemoteRegistry

    return registry.own_tenant if isinstance(registry, RemoteRegistry) and "/" not in text else DEFAULT_TENANT


def fetch(registry: Registry, tenant: str, name: str, version: str) -> bytes:
    """The bytes of one version of a task. A server gets only one request."""
    from prefixes.client import RemoteRegistry

    if isinstance(registry, RemoteRegistry):
        return registry.download(tenant, name, version)
    return registry.fetch(tenant, version)


def loaded(name: str) -> Backbone:
    """The backbone ``name``, to be looked at and not to generate.

    Its progress shows only on a terminal, so that elsewhere stderr has only errors.
    """
    import transformers

    from prefixes.backbone import load_backbone

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return load_backbone(name, ignore_generation_config=None)


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object in an option's text. Raises BadParameter for anything else."""
    from prefixes.errors import InvalidArtifact
    from prefixes.spec_json import parse_json

    try:
        value = parse_json(option, text)
    except InvalidArtifact as error:
        raise typer.BadParameter(error.message) from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{option}: expected a JSON object, got {type(value).__name__}")
    return value


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)
