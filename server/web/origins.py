"""Whether a request may come from where it comes: its Host, its Origin, and the proxies before it.

Owns what keeps web pages out, which a browser lets send simple requests to any address, and which can give a name of
their own any address (DNS rebinding). Knows no key.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.web.errors import Forbidden

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")
_PORTS: Final = {"http": 80, "https": 443}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(headers: Headers, allowed: Sequence[str]) -> None:
    """Raise Forbidden unless the Host header is one of ``allowed``; a port beside the name does not count."""
    hosts = headers.getlist("host")
    got = hosts[0] if len(hosts) == 1 else ""
    name = got if got.endswith("]") else got.rpartition(":")[0] or got
    if name.lower() not in [one.lower() for one in allowed] and got.lower() not in [one.lower() for one in allowed]:
        raise Forbidden(f"host: expected {' or '.join(allowed)} (--allowed-hosts names others), got {got[:100]!r}")


def check_not_proxied(headers: Headers) -> None:
    """Raise Forbidden for a request that came through a proxy: its clients are not of this machine."""
    for name in headers:
        if name == "forwarded" or name.startswith("x-forwarded-"):
            raise Forbidden(
                f"{name}: expected no proxy in front of a server without keys; `prefixd keys create` makes one, "
                "--open-access serves everybody"
            )


def check_origin(method: str, headers: Headers, allowed: Sequence[str]) -> None:
    """Raise Forbidden for a write that a web page of another origin sends.

    The scheme is not compared, since TLS may end in front of the service; an origin's own port may be left out.
    """
    if method in SAFE_METHODS:
        return
    origin = headers.get("origin")
    if origin is not None and origin in allowed:
        return
    if origin is not None and not _same(origin, headers.get("host", "")):
        raise Forbidden(f"origin: expected this service's own, or one of --allowed-origins, got {origin[:200]!r}")
    if origin is None and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Forbidden("sec-fetch-site: expected a write of no other site's page, got one")


def _same(origin: str, host: str) -> bool:
    try:
        parts, own = urlsplit(origin), urlsplit(f"//{host}")
        usual = _PORTS.get(parts.scheme)
        return (
            usual is not None
            and parts.hostname is not None
            and parts.hostname == own.hostname
            and (parts.port or usual) == (own.port or usual)
        )
    except ValueError:  # a port that is none
        return False
