"""The version of the project."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed package's version, or ``0`` if it is not installed."""
    try:
        return version("prefixd")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
