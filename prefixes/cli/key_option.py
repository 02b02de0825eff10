"""The option ``--key`` of every command that speaks to a service.

Owns how it reaches the code that connects, past commands that need not know of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Annotated, Any, Final, get_type_hints

import typer
from typer.models import OptionInfo

from prefixes.credentials import presented_key

KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="@FILE",
        help="The key for the service, in a file, or itself, which other users of the machine can read then. "
        "[env: PREFIXD_KEY]",
        show_default=False,
    ),
]  # fmt: skip
_given: Final[ContextVar[str | None]] = ContextVar("key", default=None)


def key_of_command() -> str | None:
    """The secret that the running command, or its environment, was given. Raises NoKey."""
    return presented_key(_given.get(), _warn)


def check_key_has_server(server: str | None) -> None:
    """Raise BadParameter for ``--key`` where the command goes to no server."""
    if server is None and _given.get() is not None:
        raise typer.BadParameter("--key: expected --server with it, whose key it is, got none")


def with_key(function: Callable[..., Any], wrapped: Callable[..., Any]) -> None:
    """Give ``wrapped``, which calls ``function``, the option ``--key`` if ``function`` can be told of a service."""
    hints = get_type_hints(function, include_extras=True)
    if not any(_names_service(hint) for hint in hints.values()):
        return
    own = [one.replace(annotation=hints[one.name]) for one in inspect.signature(function).parameters.values()]
    key = inspect.Parameter("key", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=KeyOption)
    wrapped.__signature__ = inspect.Signature([*own, key])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {**hints, "key": KeyOption}


def _names_service(hint: Any) -> bool:
    options = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, OptionInfo) and not one.hidden]
    # Within Annotated typer takes the first name for a default until it makes the command.
    return any({"--server", "--trainer"} & {option.default, *(option.param_decls or ())} for option in options)


def take_key(options: dict[str, Any]) -> None:
    """Take ``--key`` out of a command's options and remember it."""
    given = options.pop("key", None)
    _given.set(given)
    if given is not None and not given.startswith("@"):
        _warn("--key: other users of this machine can read it; give @FILE, or PREFIXD_KEY")


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)
