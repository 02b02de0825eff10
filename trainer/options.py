"""What the trainer's command lines share: errors as one line, and decoding parameters as ``name=value``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from prefixes.errors import InvalidParameter, PrefixdError
from prefixes.parameters import check_decoding_parameters


@contextmanager
def named_errors() -> Iterator[None]:
    """Named errors become one line and exit code 1; anything else is a defect and keeps its traceback."""
    try:
        yield
    except PrefixdError as error:
        typer.secho(f"error ({error.code}): {error.message}", fg="red", err=True)
        raise typer.Exit(1) from error


def decoding_parameters(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """``name=JSON value`` pairs of a repeatable ``option``, names and types checked. Raises InvalidParameter."""
    made: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            made[name] = json.loads(text)
        except ValueError as error:
            raise InvalidParameter(f"{option}: expected name=JSON value, got {pair!r}", got=pair) from error
    check_decoding_parameters(made)
    return made
