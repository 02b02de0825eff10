"""The options of commands that set limits, one for each limit that there is, and how limits are shown.

Owns their names, which are those of ``prefixes.tenancy.limits``, and the table. Knows no command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, get_type_hints

import typer

from prefixes.cli import show
from prefixes.tenancy.limits import DESCRIPTIONS, NAMES

LimitChanges = Mapping[str, int | None]
"""What the options of a command say: values by name, None for what is unset."""
NO_CHANGES: Final[LimitChanges] = {}
UnsetOption = Annotated[
    list[str] | None,
    typer.Option("--unset", metavar="NAME", help="Take a limit away; a tenant's default holds then (repeatable)."),
]


def with_limit_options(*, unset: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each limit, in the place of its parameter ``limits``; ``unset`` adds ``--unset``."""

    def given(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [one.replace(annotation=hints[one.name]) for one in inspect.signature(function).parameters.values()]
        at = next(number for number, one in enumerate(own) if one.name == "limits")
        made = [_parameter(name, Annotated[int | None, _option(name)]) for name in NAMES]
        if unset:
            made.append(_parameter("unset", UnsetOption))

        @functools.wraps(function)
        def told(**options: Any) -> None:
            values = {name: value for name in NAMES if (value := options.pop(name)) is not None}
            gone = {name.replace("-", "_"): None for name in options.pop("unset", None) or ()}
            if both := sorted(gone.keys() & values.keys()):
                raise typer.BadParameter(f"--unset {both[0]}: expected it set or unset, got both")
            function(**options, limits={**values, **gone})

        parameters = [*own[:at], *made, *own[at + 1 :]]
        told.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        told.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
        return told

    return given


def show_limits(found: Mapping[str, Any], as_json: bool) -> None:
    """Print the limits of a tenant or a key: those that were set for it, and those in force."""
    if as_json:
        show.show_json(found)
        return
    rows = [["weight", f"{found['weight']:g}", f"{found['weight']:g}"]] if "weight" in found else []
    limits, in_force = found["limits"], found["limits_in_force"]
    rows += [[name, _shown(limits.get(name)), _shown(in_force.get(name))] for name in NAMES]
    show.show_table(["limit", "set", "in force"], rows)


def tell_held(key: Mapping[str, Any]) -> None:
    """Say on stderr which limits of a key are above its tenant's."""
    for name, value in key["limits"].items():
        if (holds := key["limits_in_force"][name]) < value:
            typer.echo(f"{name}: {value} is above what tenant {key['tenant']} has; {holds} holds", err=True)


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)


def _option(name: str) -> Any:
    option = f"--{name.replace('_', '-')}"
    return typer.Option(option, metavar="N", help=DESCRIPTIONS[name], show_default=False)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)
