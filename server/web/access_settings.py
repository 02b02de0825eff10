"""The settings of every service about who gets in. Owns their names, defaults and help texts; does not know what they
do (``authentication``, ``origins``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from server.web.connection_settings import ConnectionSettings
from server.web.settings_types import Names

_ORIGIN: Final = re.compile(r"https?://[^\s/*?#@A-Z]+")
_HOST: Final = re.compile(r"[^\s/*?#@]+")


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if not all(map(_ORIGIN.fullmatch, origins)):
        raise ValueError("expected origins as browsers send them, such as https://app.example.com")
    return origins


def _check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    if not all(map(_HOST.fullmatch, hosts)):
        raise ValueError("expected names of hosts, such as api.example.com or 10.0.0.5:8000")
    return hosts


class AccessSettings(ConnectionSettings):
    """What a service asks of those who call it."""

    open_access: bool = Field(
        False, description="Serve beyond this machine, or behind a proxy, although no key was ever made."
    )
    operator_hash_file: Path | None = Field(
        None, description="File with the id and SHA-256 of an operator's key, which is made at start if it is new."
    )
    metrics_hash_file: Path | None = Field(
        None, description="The same for a key with the scope metrics, for Prometheus."
    )
    allowed_hosts: Annotated[Names, AfterValidator(_check_hosts)] = Field(
        (), description="A Host header to accept (repeatable); default: loopback names, or any once there are keys."
    )
    allowed_origins: Annotated[Names, AfterValidator(_check_origins)] = Field(
        (), description="The origin of a web page that may call, such as https://app.example.com (repeatable)."
    )
    max_stale_auth_s: float = Field(
        60.0, ge=0, le=86400, allow_inf_nan=False,
        description="Seconds for which known keys work while the registry does not answer.",
    )  # fmt: skip
