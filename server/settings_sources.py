"""Where settings come from: flags over environment over file over defaults; an unknown name in any is an error.

Owns precedence and messages; knows no setting by name.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from prefixes.errors import PrefixdError
from server.settings import Settings

PREFIX: Final = "PREFIXD_"
CONFIG_VARIABLE: Final = "PREFIXD_CONFIG"
OTHER_VARIABLES: Final = frozenset({CONFIG_VARIABLE, "PREFIXD_SERVER", "PREFIXD_API_KEY"})
"""Variables of ours that are no server settings."""
OTHER_PREFIXES: Final = ("PREFIXD_TRAINER_", "PREFIXD_TEST_", "PREFIXD_BENCH_")
"""Beginnings of variables that other programs of this project read."""


class InvalidSettings(PrefixdError):
    """A setting is unknown or has a value it cannot have; the message says where it came from."""

    code = "invalid_settings"


def load_settings(flags: Mapping[str, Any], *, config: Path | None = None) -> Settings:
    """Settings from ``flags`` (only those given), the environment and the TOML file ``config`` or PREFIXD_CONFIG.

    Raises InvalidSettings.
    """
    names, environment = set(Settings.model_fields), dict(os.environ)
    for flag in flags:
        if flag not in names:
            raise InvalidSettings(f"option --{_dashed(flag)}: unknown{did_you_mean(flag, names, _dashed)}")
    _check_environment(environment, names)
    if config is None and environment.get(CONFIG_VARIABLE):
        config = Path(environment[CONFIG_VARIABLE])
    in_file = _read_file(config, names) if config else {}
    try:
        return _with_file(in_file)(**flags)
    except ValidationError as error:
        raise InvalidSettings("; ".join(_explain(item, flags, environment, in_file, config) for item in error.errors(
            include_url=False, include_context=False))) from None


def did_you_mean(name: str, known: Iterable[str], show: Any = str) -> str:
    """``; did you mean X?`` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {show(close[0])}?" if close else ""


def _with_file(in_file: Mapping[str, Any]) -> type[Settings]:
    class SettingsWithFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *sources: Any, **named: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            above = super().settings_customise_sources(settings_cls, *sources, **named)
            return (*above, InitSettingsSource(settings_cls, dict(in_file)))

    return SettingsWithFile


def _check_environment(environment: Mapping[str, str], names: set[str]) -> None:
    for variable in sorted(environment):
        if not variable.upper().startswith(PREFIX) or variable.upper() in OTHER_VARIABLES:
            continue
        name = variable[len(PREFIX) :].lower()
        if name not in names and not variable.upper().startswith(OTHER_PREFIXES):
            raise InvalidSettings(
                f"environment variable {variable}: unknown"
                + did_you_mean(name, names, lambda known: PREFIX + str(known).upper())
            )


def _read_file(config: Path, names: set[str]) -> dict[str, Any]:
    try:
        values = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"settings file {config}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettings(f"settings file {config}: expected TOML: {error}") from None
    for name in values:
        if name not in names:
            raise InvalidSettings(f"settings file {config}: {name}: unknown{did_you_mean(name, names)}")
    return values


def _explain(
    item: Any, flags: Mapping[str, Any], environment: Mapping[str, str], in_file: Mapping[str, Any], config: Path | None
) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return message
    name = str(item["loc"][0])
    if name in flags:
        origin = f"option --{_dashed(name)}"
    elif any(variable.upper() == f"{PREFIX}{name.upper()}" and value for variable, value in environment.items()):
        origin = f"environment variable {PREFIX}{name.upper()}"
    elif name in in_file:
        origin = f"settings file {config}: {name}"
    else:
        origin = name
    return f"{origin}: {message}, got {str(item['input'])[:80]!r}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
