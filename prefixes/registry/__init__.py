"""Where prefixes live: ``open_registry(url)`` gives the store behind a URL, as ``base.Registry``.

Owns the reading of registry URLs; knows no store's insides.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from prefixes.errors import RegistryUnavailable

if TYPE_CHECKING:
    from prefixes.registry.base import Registry


def open_registry(url: str, *, create: bool = True) -> Registry:
    """The registry at ``disk:///absolute/path``, ``disk:relative/path`` or a plain path.

    A missing or empty folder becomes a registry if ``create``. Raises RegistryUnavailable for another scheme, a folder
    that holds something else, or where there is none.
    """
    from prefixes.registry.disk import DiskRegistry  # imports torch, which reading a URL does not need

    return DiskRegistry(registry_path(url), create=create)


def registry_path(url: str) -> Path:
    """The folder that ``url`` names. Raises RegistryUnavailable for a scheme other than ``disk:``."""
    scheme, colon, _ = url.partition(":")
    if not colon or "/" in scheme:
        path = url
    elif scheme == "disk":
        parts = urlsplit(url)
        if parts.netloc or parts.query or parts.fragment:
            raise RegistryUnavailable(
                "registry URL: expected disk:///absolute/path or disk:relative/path, got "
                + ("a host" if parts.netloc else "a query or fragment")
            )
        path = unquote(parts.path)
    else:
        raise RegistryUnavailable(
            f"registry URL: expected a path, disk:///absolute/path or disk:relative/path; got the scheme {scheme!r}"
            + (", which is not supported yet" if scheme in ("redis", "rediss") else ""),
            expected=["disk"],
            got=scheme,
        )
    if not path:
        raise RegistryUnavailable("registry URL: expected a path, got none")
    return Path(path).expanduser()


def default_registry_url() -> str:
    """``$XDG_DATA_HOME/prefixd/registry``, or ``~/.local/share/prefixd/registry``, as a ``disk:`` URL."""
    data_home = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data_home) if Path(data_home).is_absolute() else Path.home() / ".local" / "share"
    return f"disk://{quote(str(base / 'prefixd' / 'registry'))}"
