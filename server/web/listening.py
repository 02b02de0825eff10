"""Sockets and uvicorn, for services whose signals and drain are their own.

Owns how an address is bound, before anything slow is done, and uvicorn's configuration; knows no application.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import uvicorn

from prefixes.errors import PrefixdError

if TYPE_CHECKING:  # a taken port shows before the application's imports
    from fastapi import FastAPI

FLUSH_S: Final = 5
"""Seconds that clients get, after the last row has ended, to read the rest of their answers."""

SAME_SIGNAL_S: Final = 0.5
"""A further signal this soon is the same one, delivered twice: to the process group and again by `make`, say."""


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
    """uvicorn's configuration; with ``lifespan`` the application's is run."""
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
    """uvicorn's server without its signal handlers: signals are the process's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield
