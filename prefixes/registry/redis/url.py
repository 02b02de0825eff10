"""Redis URLs: their forms, and the connections that they stand for.

    redis://[user:password@]host[:port][/db]                       one server
    redis+sentinel://[user:password@]host[:port],host…/service[/db]  the master that Sentinels name
    redis+cluster://[user:password@]host[:port],host…              a Cluster

``rediss`` instead of ``redis`` is the same over TLS. Options after ``?``: ``password_file``, ``ca_certs``,
``certfile``, ``keyfile``, ``timeout_s``. Owns this form and redis-py's settings; knows no registry. No message and no
``repr`` holds a password.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import ExponentialWithJitterBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from prefixes.errors import RegistryUnavailable

Kind = Literal["server", "sentinel", "cluster"]

SCHEMES: Final[dict[str, tuple[Kind, bool]]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
OPTIONS: Final = ("password_file", "ca_certs", "certfile", "keyfile", "timeout_s")
TIMEOUT_S: Final = 1.0
HEALTH_CHECK_S: Final = 15
RETRIES: Final = (ExponentialWithJitterBackoff(base=0.01, cap=0.1), 2, (redis.ConnectionError,))
"""A broken connection is tried again immediately; a server that does not answer in time is not asked twice."""
_PORTS: Final[dict[Kind, int]] = {"server": 6379, "sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True)
class RedisTarget:
    """Where a registry's Redis is. ``timeout_s`` bounds a connect and each wait for an answer."""

    kind: Kind
    hosts: tuple[tuple[str, int], ...]
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    options: dict[str, str] = field(default_factory=dict)  # ca_certs, certfile, keyfile
    timeout_s: float = TIMEOUT_S

    def connect(self, *, patience: float = 1.0) -> redis.Redis | RedisCluster:
        """A client of redis-py. It connects at its first use; a Cluster's connects now and asks for the slots.

        Raises redis.RedisError. ``patience`` multiplies the wait for answers: artifacts are megabytes.
        """
        shared = self._shared(patience)
        retry = Retry(*RETRIES)
        if self.kind == "cluster":
            nodes = [ClusterNode(host, port) for host, port in self.hosts]
            return RedisCluster(startup_nodes=nodes, retry=retry, **shared)
        if self.kind == "sentinel":
            of_sentinels = {name: value for name, value in shared.items() if name not in ("username", "password")}
            of_sentinels["socket_timeout"] = self.timeout_s
            sentinel = Sentinel(list(self.hosts), sentinel_kwargs=of_sentinels)
            master: redis.Redis = sentinel.master_for(self.service, db=self.db, retry=retry, **shared)
            return master
        host, port = self.hosts[0]
        return redis.Redis(host, port, db=self.db, retry=retry, **shared)

    def connect_asyncio(self, *, patience: float = 1.0) -> redis.asyncio.Redis:
        """As ``connect``, for one event loop; not for a Cluster."""
        shared = self._shared(patience)
        retry = AsyncRetry(*RETRIES)
        if self.kind == "sentinel":
            of_sentinels = {name: value for name, value in shared.items() if name not in ("username", "password")}
            sentinel = AsyncSentinel(list(self.hosts), sentinel_kwargs=of_sentinels)
            master: redis.asyncio.Redis = sentinel.master_for(self.service, db=self.db, retry=retry, **shared)
            return master
        host, port = self.hosts[0]
        return redis.asyncio.Redis(host=host, port=port, db=self.db, retry=retry, **shared)

    def _shared(self, patience: float) -> dict[str, Any]:
        shared: dict[str, Any] = {
            "username": self.username,
            "password": self.password,
            "socket_timeout": self.timeout_s * patience,
            "socket_connect_timeout": self.timeout_s,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_CHECK_S,
            "client_name": "prefixd",
        }
        if self.tls:
            shared |= {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
            shared |= {f"ssl_{name}": value for name, value in self.options.items()}
        return shared


def disconnect(client: redis.Redis | RedisCluster) -> None:
    """Close every connection of a client, also those to the Sentinels that named its master."""
    client.close()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            sentinel.close()


def disconnect_idle(client: redis.Redis | RedisCluster) -> None:
    """Close the unused connections; the next command makes a new one."""
    clients = [client]
    if isinstance(client, RedisCluster):
        clients = [node.redis_connection for node in client.get_nodes() if node.redis_connection]
    for one in clients:
        one.connection_pool.disconnect(inuse_connections=False)


def parse_redis_url(url: str) -> RedisTarget:
    """The target that ``url`` names. Raises RegistryUnavailable; its message holds no secret."""
    if not is_unambiguous(url):
        raise _wrong("a password's / ? # @ [ ] written as %2F %3F %23 %40 %5B %5D", "an @ that is not before the hosts")
    try:
        parts = urlsplit(url)
    except ValueError:  # its message may hold the password
        raise _wrong("user:password@host:port in ASCII, what is not being written as %XX", "something else") from None
    kind, tls = SCHEMES[parts.scheme]
    options = _options(parts.query)
    userinfo, _, hosts = parts.netloc.rpartition("@")
    user, colon, password = userinfo.partition(":")
    path = [unquote(part) for part in parts.path.split("/")[1:] if part]
    if parts.fragment:
        raise _wrong("no #fragment", "one")
    if kind == "server" and "," in hosts:
        raise _wrong("one host", f"{hosts.count(',') + 1}; redis+sentinel:// and redis+cluster:// take several")
    if kind == "sentinel" and not path:
        raise _wrong("redis+sentinel://HOST,HOST/SERVICE, the service being the master's name", "no service")
    if kind == "cluster" and path:
        raise _wrong("no database: a Cluster has but one", f"/{'/'.join(path)}")
    service, *rest = path if kind == "sentinel" else ["", *path]
    if len(rest) > 1 or not all(part.isascii() and part.isdigit() for part in rest):
        raise _wrong("a database number behind the last /", f"{'/'.join(rest)!r}")
    secret = unquote(password) if colon else None
    if "password_file" in options:
        if secret is not None:
            raise _wrong("a password or a password_file", "both")
        secret = _secret(options.pop("password_file"))
    timeout_s = _seconds(options.pop("timeout_s", str(TIMEOUT_S)))
    if options and not tls:
        raise _wrong(f"rediss, which is TLS, with {', '.join(options)}", parts.scheme)
    for name, file in options.items():
        if not Path(file).is_file():
            raise _wrong(f"a file for {name}", f"none at {file}")
    return RedisTarget(
        kind=kind,
        hosts=tuple(_host(text, _PORTS[kind]) for text in hosts.split(",")),
        service=service,
        db=int(rest[0]) if rest else 0,
        username=unquote(user) or None,
        password=secret,
        tls=tls,
        timeout_s=timeout_s,
        options=options,
    )


def is_unambiguous(url: str) -> bool:
    """Whether every ``@`` stands before the hosts. Otherwise a / ? or # of the password may have cut the URL."""
    rest = url.partition("://")[2]
    return "@" not in rest[len(re.split("[/?#]", rest)[0]) :]


def _options(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else []
    except ValueError:
        raise _wrong("options as NAME=VALUE&NAME=VALUE", "something else") from None
    options = dict(pairs)
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown or len(options) != len(pairs):
        raise _wrong(f"options among {', '.join(OPTIONS)}, each once", ", ".join(unknown) or "one twice")
    if any(not value for value in options.values()):
        raise _wrong("a value for every option", "an empty one")
    return options


def _host(text: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _wrong("host[:port]", f"{text!r}") from None
    if not host or port == 0:
        raise _wrong("host[:port]", f"{text!r}")
    return host, port or default_port


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 60:
        raise _wrong("timeout_s from 0.01 to 60", repr(text))
    return value


def _secret(path: str) -> str:
    try:
        secret = Path(path).read_text().strip("\r\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise RegistryUnavailable(f"registry URL: password_file {path}: {reason}") from None
    if not secret:
        raise _wrong(f"a password in {path}", "an empty file")
    return secret


def _wrong(expected: str, got: str) -> RegistryUnavailable:
    return RegistryUnavailable(f"registry URL: expected {expected}; got {got}")
