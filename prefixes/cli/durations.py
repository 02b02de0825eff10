"""Durations as commands take them: 30m, 24h, 7d. Owns their form."""

from __future__ import annotations

import re
from typing import Final

import typer

_FORM: Final = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*([smhd]?)")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(option: str, text: str, *, days: bool = False) -> float:
    """The seconds of a duration. With ``days`` a number alone is days. Raises BadParameter for ``option``."""
    found = _FORM.fullmatch(text.strip())
    if found is None or not (found[2] or days):
        form = "days, or a number with s, m, h or d" if days else "a number with s, m, h or d, such as 24h"
        raise typer.BadParameter(f"{option}: expected {form}, got {text!r}")
    return float(found[1]) * _SECONDS[found[2] or "d"]
