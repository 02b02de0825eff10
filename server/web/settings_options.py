"""Makes a command's options from a service's settings, one per setting. Knows no setting by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic_core import PydanticUndefined

from server.web.settings_sources import ServiceSettings


def options_of(kind: type[ServiceSettings]) -> inspect.Signature:
    """The signature of a command ``(config: Path | None, **flags)`` with an option for every setting of ``kind``."""
    help_text = f"Settings from this TOML file; also {kind.variable('config')}."
    shared_last = sorted(kind.model_fields, key=lambda name: name not in vars(kind)["__annotations__"])
    config = Annotated[Path | None, typer.Option(help=help_text, show_default=False)]
    return inspect.Signature(
        [
            inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config),
            *(_option(kind, name) for name in shared_last),
        ]
    )


def _option(kind: type[ServiceSettings], name: str) -> inspect.Parameter:
    """The option for one setting. Unset is None, so that lower sources show through."""
    field = kind.model_fields[name]
    default = "" if field.default in (None, PydanticUndefined, ()) else f" [default: {_shown(field.default)}]"
    parsed = _parsed(field.annotation)
    flag = f"--{name.replace('_', '-')}"
    flags = [f"{flag}/--no-{flag[2:]}"] if parsed is bool else [flag]
    option = typer.Option(*flags, help=f"{field.description or ''}{default}", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[parsed | None, option]
    )


def _parsed(annotation: Any) -> Any:
    """The type that the command line parses itself. Everything else is text that the settings validate."""
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
