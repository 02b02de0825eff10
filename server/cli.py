"""``prefixd serve``: has one option per setting, made from the settings.

Owns the command line and knows no setting by name. Torch and its users are imported when the command runs, so that
``--help`` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from prefixes.errors import PrefixdError
from prefixes.tenancy.secret import without_secrets
from server.settings import Settings
from server.web.settings_options import options_of
from server.web.settings_sources import InvalidSettings, load_settings

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
    """Start the server and stay until a signal. Exits with 1, and one line on stderr, if it cannot start."""
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    try:
        settings = load_settings(Settings, given, config=config)
        from server.web.logs import configure_logging

        configure_logging(settings.log_level)
        from server.lifecycle import bind

        _configure_threads(settings.threads)
        with bind(settings) as sockets:  # first, so that a taken port fails before minutes of loading
            from server.app import create_apps
            from server.assembly import assemble
            from server.lifecycle import serve as serve_app

            code = serve_app(create_apps(assemble(settings)), sockets, settings)
    except PrefixdError as error:
        print(f"prefixd serve: {without_secrets(error.message)}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1) from None
    raise typer.Exit(code)


def _configure_threads(threads: int | None) -> None:
    from server.engine.kernels.threads import configure_threads

    try:
        configure_threads(threads)  # before torch is imported
    except ValueError as error:
        raise InvalidSettings(str(error)) from None


serve.__signature__ = options_of(Settings)  # type: ignore[attr-defined]
