"""The ``prefixd`` command: mounts the sub-commands of the three packages, and nothing else.

A sub-command's module is imported when it is asked for, so that ``prefixd --help`` needs none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperGroup


def _backbones() -> typer.Typer:
    import prefixes.cli.backbones

    return prefixes.cli.backbones.backbones_app


def _serve() -> typer.Typer:
    import server.cli

    return _single("serve", server.cli.serve, server.cli.HELP)


def _prefixes() -> typer.Typer:
    import prefixes.cli

    return prefixes.cli.app


def _keys() -> typer.Typer:
    import prefixes.cli.keys

    return prefixes.cli.keys.keys_app


def _tenants() -> typer.Typer:
    import prefixes.cli.tenants

    return prefixes.cli.tenants.tenants_app


def _usage() -> typer.Typer:
    import prefixes.cli.usage

    return prefixes.cli.usage.usage_app


def _train() -> typer.Typer:
    import trainer.cli.train

    return trainer.cli.train.train_app


def _trainer() -> typer.Typer:
    import trainer.service.cli

    return _single("trainer", trainer.service.cli.trainer, trainer.service.cli.HELP)


def _jobs() -> typer.Typer:
    import trainer.cli.jobs

    return trainer.cli.jobs.jobs_app


def _datasets() -> typer.Typer:
    import trainer.cli.jobs

    return trainer.cli.jobs.datasets_app


def _convert() -> typer.Typer:
    import trainer.cli.convert

    return _single("convert", trainer.cli.convert.convert)


def _evaluate() -> typer.Typer:
    import trainer.cli.evaluate

    return trainer.cli.evaluate.evaluate_app


COMMANDS: dict[str, tuple[str, Callable[[], typer.Typer]]] = {
    "serve": ("Serve tasks over HTTP.", _serve),
    "prefixes": ("List, inspect, publish, import, export and move prefixes.", _prefixes),
    "keys": ("Make, rotate and revoke callers' keys.", _keys),
    "tenants": ("Make, list and block tenants.", _tenants),
    "usage": ("Show what tenants used, and what it costs.", _usage),
    "train": ("Train a prefix on a frozen backbone and publish it.", _train),
    "evaluate": ("Score a prefix on a test set.", _evaluate),
    "trainer": ("Run training jobs as a service over HTTP.", _trainer),
    "jobs": ("Submit jobs to a running trainer, watch and manage them.", _jobs),
    "datasets": ("Upload, list and delete a running trainer's datasets.", _datasets),
    "backbones": ("List the backbones that have a name, and fetch them.", _backbones),
    "convert": ("Convert a corpus to the trainer's JSONL.", _convert),
}


class LazyGroup(TyperGroup):
    """Knows the commands by name and help text, and imports a command when it is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that ``args`` names, then resolve it as typer does."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = typer.main.get_command(COMMANDS[args[0]][1]())
        return super().resolve_command(ctx, args)


def _typer(**settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **settings)


def _single(name: str, function: Callable[..., Any], help_text: str | None = None) -> typer.Typer:
    app = _typer()
    app.command(name, help=help_text)(function)
    return app


app = _typer(
    name="prefixd",
    cls=LazyGroup,
    help="Many prefix-tuned tasks, one frozen language model: train prefixes, keep them, serve them.",
    no_args_is_help=True,
)
for _name, (_help, _) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def main() -> None:
    """The console script. A character that the terminal's encoding lacks is shown escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="prefixd")


if __name__ == "__main__":
    main()
