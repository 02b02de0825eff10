"""What the trainer's command lines share: options, errors as one line, ``name=value`` pairs, texts to start from.

Knows no command. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from prefixes.errors import InvalidParameter, PrefixdError
from prefixes.parameters import check_decoding_parameters
from prefixes.strict_json import strict_json
from prefixes.tenancy.secret import without_secrets
from trainer.data.texts import checked, is_blank

MAX_TEXT_BYTES: Final = 1 << 20
"""Most bytes of a text to start from; a prefix uses at most a window of tokens."""

DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="Of the frozen model: float32, bfloat16, float16, float64.")]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(help="A field of the backbone's generation config that does not count; repeatable."),
]


@contextmanager
def named_errors() -> Iterator[None]:
    """Turn a named error into one line and exit code 1. Any other error is a defect and keeps its traceback."""
    try:
        yield
    except PrefixdError as error:
        typer.secho(f"error ({error.code}): {without_secrets(error.message)}", fg="red", err=True)
        raise typer.Exit(1) from error


def initial_text(path: Path) -> str:
    """Read the text that a prefix starts from, in UTF-8. Raises InvalidParameter."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        text = checked(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidParameter(f"initial text {path}: expected a UTF-8 file, got {error}") from error
    if len(content) > MAX_TEXT_BYTES:
        raise InvalidParameter(f"initial text {path}: expected at most {MAX_TEXT_BYTES} bytes, got more")
    if is_blank(text):
        raise InvalidParameter(f"initial text {path}: expected a text, got an empty one")
    return text


def decoding_parameters(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Parse the ``name=JSON value`` pairs of a repeatable ``option``, each name once, and check names and types.

    Raises InvalidParameter.
    """
    made: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name in made:
            raise InvalidParameter(f"{option}: expected each name once, got {name[:80]!r} twice", got=name[:80])
        try:
            made[name] = strict_json(text)
        except ValueError as error:
            raise InvalidParameter(f"{option}: expected name=JSON value, got {pair[:80]!r}", got=pair[:80]) from error
    check_decoding_parameters(made)
    return made
