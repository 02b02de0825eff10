"""What ``prefixd jobs`` and ``prefixd datasets`` share: the choice of trainer, and how a command fails.

Owns the common options and the exit codes: 0 for success; 1 for an error, shown in one line on stderr, or a failed job;
2 for wrong usage; 3 for a cancelled job; 130 for Ctrl-C.
"""

from __future__ import annotations

import os
from typing import Annotated, Final

import typer

from prefixes.cli.key_option import key_of_command
from trainer.client.client import TrainerClient

DEFAULT_URL: Final = "http://127.0.0.1:8100"
CANCELLED: Final = 3
INTERRUPTED: Final = 130

TrainerOption = Annotated[
    str | None,
    typer.Option(
        "--trainer",
        metavar="URL",
        help=f"The running trainer. [env: PREFIXD_TRAINER; PREFIXD_KEY for its key] [default: {DEFAULT_URL}]",
        show_default=False,
    ),
]
TenantOption = Annotated[
    str | None,
    typer.Option(
        "--tenant", metavar="NAME", help="Another tenant's, with an operator's key.", show_default=False
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Its id, job-…", show_default=False)]


def opened(trainer: str | None) -> TrainerClient:
    """Return a client of the trainer that the option or the environment names, else of ``DEFAULT_URL``."""
    url = trainer or os.environ.get("PREFIXD_TRAINER") or DEFAULT_URL
    return TrainerClient(url, api_key=key_of_command())


def note(text: str) -> None:
    """Print a note for people on stderr; stdout is for scripts."""
    typer.echo(text, err=True)
