"""Which version of the project this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed package's."""
    try:
        return version("prefixd")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
