"""Registries: ``open_registry(url)`` opens the store at a URL, as ``base.Store``.

Owns the choice of a store by its URL; knows nothing of how a store works.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote, urlsplit

from prefixes.errors import RegistryUnavailable

if TYPE_CHECKING:
    from prefixes.registry.base import Store

URL_FORMS: Final = (
    "a folder, disk:///PATH, redis[s]://HOST[:PORT][/DB], redis[s]+sentinel://HOST,…/SERVICE or redis[s]+cluster://HOST,…"
)
"""The forms of a registry URL, for help texts."""

_log = logging.getLogger("prefixd.registry")


def open_registry(
    url: str, *, create: bool = True, registry_id: str | None = None, restoring: bool = False
) -> Store:
    """The registry at ``url``, see URL_FORMS.

    ``create`` makes a missing one, and one in an empty place. ``registry_id`` is the id that it must have, or gets.
    ``restoring`` makes one that is being restored, and opens such a one. Raises RegistryUnavailable for another scheme,
    a place that cannot be reached or holds something else, or a place without a registry.
    """
    if is_redis(url):
        from prefixes.registry.redis.registry import RedisRegistry
        from prefixes.registry.redis.url import parse_redis_url

        return RedisRegistry(parse_redis_url(url), create=create, registry_id=registry_id, restoring=restoring)
    from prefixes.registry.disk.registry import DiskRegistry  # imports torch, which reading a URL does not need

    return DiskRegistry(registry_path(url), create=create, registry_id=registry_id, restoring=restoring)


def open_to_serve(url: str, *, registry_id: str | None) -> Store:
    """As ``open_registry``, for a service: logs which registry it is, and what the operator should set.

    Makes a missing one only without a ``registry_id``. With one, an emptied registry would pass for the old one, and
    all its tasks for deleted.
    """
    store = open_registry(url, create=registry_id is None, registry_id=registry_id)
    try:
        _log.info("registry opened", extra={"facts": {"registry": shown_url(url), "id": store.id}})
        for warning in store.preflight():
            _log.warning("registry: %s", warning)
    except BaseException:
        store.close()
        raise
    return store


def is_redis(url: str) -> bool:
    """Whether ``url`` names a Redis."""
    return url.partition("://")[0] in ("redis", "rediss") or url.startswith(
        tuple(f"{scheme}+{kind}://" for scheme in ("redis", "rediss") for kind in ("sentinel", "cluster"))
    )


def shown_url(url: str) -> str:
    """``url`` for logs and messages: without user, password and options."""
    if not is_redis(url):
        return str(registry_path(url))
    scheme, _, rest = url.partition("://")
    end = next((at for at, letter in enumerate(rest) if letter in "/?#"), len(rest))
    if "@" in rest[end:]:
        return f"{scheme}://…"  # the password may hold a / ? or #, which cuts the URL there
    path = rest[end:].partition("?")[0].partition("#")[0]
    return f"{scheme}://{rest[:end].rpartition('@')[2]}{path}"


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
            f"registry URL: expected {URL_FORMS}; got the scheme {scheme!r}", got=scheme
        )
    if not path:
        raise RegistryUnavailable("registry URL: expected a path, got none")
    return Path(path).expanduser()


def default_registry_url() -> str:
    """``$XDG_DATA_HOME/prefixd/registry``, or ``~/.local/share/prefixd/registry``, as a ``disk:`` URL."""
    data_home = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data_home) if Path(data_home).is_absolute() else Path.home() / ".local" / "share"
    return f"disk://{quote(str(base / 'prefixd' / 'registry'))}"
