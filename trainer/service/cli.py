"""``prefixd trainer``: one option per setting."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from prefixes.errors import PrefixdError
from prefixes.tenancy.secret import without_secrets
from server.web.settings_options import options_of
from server.web.settings_sources import load_settings
from trainer.service.settings import TrainerSettings

HELP = """Take datasets and training jobs over HTTP, run the jobs, publish what comes of them.

Every option can also be given as an environment variable (--lease-s is PREFIXD_TRAINER_LEASE_S) or in a TOML file
(lease_s = 30), see --config. Options win over the environment, the environment over the file.

\b
Examples:
  prefixd trainer                            one process, jobs in files
  prefixd trainer --backbone gpt2-medium --registry ./registry
  prefixd trainer --redis redis://redis --workers 0        the API alone
  prefixd trainer --redis redis://redis --no-api --workers 2
                                             two more workers, anywhere
"""


def trainer(config: Path | None, **flags: Any) -> None:
    """Start the service and stay until a signal; exits with 1, and one line, when it cannot start."""
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    try:
        settings = load_settings(TrainerSettings, given, config=config)
        from server.web.logs import configure_logging

        configure_logging(settings.log_level)
        from trainer.service.lifecycle import run

        code = run(settings)
    except PrefixdError as error:
        print(f"prefixd trainer: {without_secrets(error.message)}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1) from None
    raise typer.Exit(code)


trainer.__signature__ = options_of(TrainerSettings)  # type: ignore[attr-defined]
