"""``prefixd serve``: its options are the settings, made from them one by one.

Owns the command line. Torch and what needs it are imported when the command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic_core import PydanticUndefined

from prefixes.errors import PrefixdError
from server.settings import Settings
from server.settings_sources import InvalidSettings, load_settings

HELP = """Serve tasks over HTTP.

Every option can also be given as an environment variable (--max-rows is PREFIXD_MAX_ROWS) or in a TOML file
(max_rows = 64), see --config. Options win over the environment, the environment over the file. An unknown name in any
of them is an error.

\b
Examples:
  prefixd serve                              the bundled demo
  prefixd serve --backbone gpt2 --registry ./registry
  prefixd serve --host 0.0.0.0 --kv-cache-bytes 8GiB --max-rows 128
"""


def serve(config: Path | None, **flags: Any) -> None:
    """Start the server and stay until a signal; exits with 1, and one line, when it cannot start."""
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    try:
        settings = load_settings(given, config=config)
        from server.logs import configure_logging

        configure_logging(settings.log_level)
        from server.lifecycle import bind

        _configure_threads(settings.threads)
        with bind(settings) as sock:  # first: a taken port shows before minutes go into loading
            from server.app import create_app
            from server.assembly import assemble
            from server.lifecycle import serve as serve_app

            code = serve_app(create_app(assemble(settings)), sock, settings)
    except PrefixdError as error:
        print(f"prefixd serve: {error.message}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1) from None
    raise typer.Exit(code)


def _configure_threads(threads: int | None) -> None:
    from server.engine.kernels.threads import configure_threads

    try:
        configure_threads(threads)  # before torch is imported
    except ValueError as error:
        raise InvalidSettings(str(error)) from None


def _option(name: str) -> inspect.Parameter:
    """The option for one setting; unset is None, so that lower sources show through."""
    field = Settings.model_fields[name]
    default = "" if field.default in (None, PydanticUndefined, ()) else f" [default: {_shown(field.default)}]"
    kind = _kind(field.annotation)
    flag = f"--{name.replace('_', '-')}"
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    option = typer.Option(*flags, help=f"{field.description or ''}{default}", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _kind(annotation: Any) -> Any:
    """What the command line parses itself; everything else is text that the settings validate."""
    kinds = [annotation, *get_args(annotation)]
    kinds += [inner for kind in kinds for inner in get_args(kind)]
    for kind in (bool, int, float):
        if kind in kinds:
            return kind
    return list[str] if any(get_origin(kind) is tuple for kind in kinds) else str


def _shown(default: Any) -> str:
    if isinstance(default, ByteSize):
        return default.human_readable()
    return str(default).lower() if isinstance(default, bool) else str(default)


_config = typer.Option(help="Settings from this TOML file; also PREFIXD_CONFIG.", show_default=False)
serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, _config]
        ),
        *(_option(name) for name in Settings.model_fields),
    ]
)
