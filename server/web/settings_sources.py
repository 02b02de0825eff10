"""Where settings come from: flags over environment over file over defaults. An unknown name in any is an error.

Owns precedence and messages. Knows no setting by name.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, SettingsConfigDict

from prefixes.errors import PrefixdError
from server.web.suggest import did_you_mean

OTHER_VARIABLES: Final = frozenset({"PREFIXD_SERVER", "PREFIXD_TRAINER", "PREFIXD_KEY"})
"""Our variables that are no service's settings."""
OTHER_PREFIXES: Final = ("PREFIXD_TRAINER_", "PREFIXD_TEST_", "PREFIXD_BENCH_")
"""Prefixes of variables that other programs of this project read."""

S = TypeVar("S", bound="ServiceSettings")


class InvalidSettings(PrefixdError):
    """A setting is unknown or has an invalid value. The message says where it came from."""

    code = "invalid_settings"


class ServiceSettings(BaseSettings):
    """A service's settings, frozen. A subclass has the fields, and ``env_prefix`` for its environment variables."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def variable(cls, name: str) -> str:
        """The environment variable of the setting ``name``."""
        return f"{cls.model_config['env_prefix']}{name}".upper()


def load_settings(kind: type[S], flags: Mapping[str, Any], *, config: Path | None = None) -> S:
    """Settings from ``flags`` (only those given), the environment, and the TOML file ``config``.

    Without ``config``, an environment variable may name the file.

    Raises InvalidSettings.
    """
    names, environment = set(kind.model_fields), dict(os.environ)
    for flag in flags:
        if flag not in names:
            raise InvalidSettings(f"option --{_dashed(flag)}: unknown{did_you_mean(flag, names, _dashed)}")
    _check_environment(kind, environment, names)
    if config is None and environment.get(kind.variable("config")):
        config = Path(environment[kind.variable("config")])
    in_file = _read_file(config, names) if config else {}
    sources = (InitSettingsSource(kind, dict(flags)), EnvSettingsSource(kind), InitSettingsSource(kind, in_file))
    try:
        return kind(_build_sources=(sources, {}))  # type: ignore[call-arg]  # a subclass's signature hides it
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        told = "; ".join(_explain(problem, kind, flags, environment, in_file, config) for problem in problems)
        raise InvalidSettings(told) from None


def _check_environment(kind: type[ServiceSettings], environment: Mapping[str, str], names: set[str]) -> None:
    prefix = kind.variable("")
    others = tuple(other for other in OTHER_PREFIXES if other != prefix)
    for variable in sorted(environment):
        upper = variable.upper()
        if not upper.startswith(prefix) or upper.startswith(others) or upper in OTHER_VARIABLES:
            continue
        name = upper.removeprefix(prefix).lower()
        if name not in names and name != "config":
            raise InvalidSettings(
                f"environment variable {variable}: unknown" + did_you_mean(name, names, kind.variable)
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
    item: Any,
    kind: type[ServiceSettings],
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    in_file: Mapping[str, Any],
    config: Path | None,
) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return message
    name = str(item["loc"][0])
    if name in flags:
        origin = f"option --{_dashed(name)}"
    elif any(variable.upper() == kind.variable(name) and value for variable, value in environment.items()):
        origin = f"environment variable {kind.variable(name)}"
    elif name in in_file:
        origin = f"settings file {config}: {name}"
    else:
        origin = name
    return f"{origin}: {message}, got {str(item['input'])[:80]!r}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
