"""redis-py's errors as the registry's errors.

Owns the messages. Callers over HTTP read them, so they name no host and no key; the cause names them, for logs.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis
from redis.exceptions import AskError, RedisClusterException

from prefixes.errors import RegistryFull, RegistryUnavailable

FAILURES: Final = (redis.RedisError, RedisClusterException, OSError)
"""Every error of redis-py: some of its Cluster's are no RedisError."""


@contextmanager
def guarded() -> Iterator[None]:
    """Raise redis-py's errors as RegistryUnavailable."""
    try:
        yield
    except redis.TimeoutError as error:
        raise RegistryUnavailable("registry: Redis did not answer in time") from error
    except redis.AuthenticationError as error:
        raise RegistryUnavailable("registry: Redis refused the user or the password") from error
    except RedisClusterException as error:
        raise RegistryUnavailable(
            "registry: expected a Redis Cluster that serves every slot (one server is redis://), found none"
        ) from error
    except FAILURES as error:
        if isinstance(error, redis.OutOfMemoryError) or "OOM command" in str(error):  # of a script, before Redis 7
            raise RegistryFull("registry: Redis is full; raise its maxmemory, or delete and clean up") from error
        raise RegistryUnavailable(f"registry: Redis cannot be used: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, AskError):  # MOVED too
        return "it is a node of a Cluster, whose URL is redis+cluster://"
    if isinstance(error, redis.ResponseError):
        return str(error)[:120]  # Redis' own message about a command names no host
    cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return f"TLS: {cause.reason or type(cause).__name__}"
    if isinstance(cause, socket.gaierror):
        return "its host's name is unknown"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return type(error).__name__
