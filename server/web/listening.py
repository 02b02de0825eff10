"""Sockets and uvicorn, for services that handle their signals and their drain themselves.

Owns how an address is bound, before anything slow happens, and uvicorn's configuration. Knows no application.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import uvicorn

from prefixes.errors import PrefixdError

if TYPE_CHECKING:  # a taken port fails before the application's imports
    from fastapi import FastAPI

FLUSH_S: Final = 5
"""Seconds that clients get to read the rest of their answers after the last row has ended."""

SAME_SIGNAL_S: Final = 0.5
"""A further signal within this time is the same one delivered twice, for example to the process group and by `make`."""


class CannotListen(PrefixdError):
    """The address cannot be bound."""

    code = "cannot_listen"


def bind(host: str, port: int, option: str = "") -> socket.socket:
    """A bound socket that does not listen yet. Raises CannotListen, which names ``option``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        where = f"{host} port {port}{option}"
        raise CannotListen(f"cannot listen on {where}: {error.strerror or error}") from None
    sock.set_inheritable(True)
    return sock


def configured(app: FastAPI, *, lifespan: bool) -> uvicorn.Config:
    """uvicorn's configuration. ``lifespan`` says whether uvicorn runs the application's lifespan."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on" if lifespan else "off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=FLUSH_S,
    )


def url_of(sock: socket.socket) -> str:
    """``http://host:port``."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Listener(uvicorn.Server):
    """uvicorn's server without its signal handlers, because the service has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
