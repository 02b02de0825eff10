"""Where a service listens: sockets that are bound before anything slow happens.

Owns how an address is bound, and which addresses of this machine a setting means. Knows no application.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Final

from prefixes.errors import PrefixdError

LOOPBACK: Final = "127.0.0.1"
"""Where the images' health check asks, whatever the network."""
_ANY_PORT: Final = 9


class CannotListen(PrefixdError):
    """The address cannot be bound."""

    code = "cannot_listen"


def addresses_of(host: str) -> tuple[str, ...]:
    """The addresses that an ``admin_host`` means: itself; of a network, this machine's own in it, and 127.0.0.1.

    Raises CannotListen where this machine has no address in the network.
    """
    if "/" not in host:
        return (host,)
    network = ipaddress.ip_network(host)
    own = _own_address(network)
    if own is None or ipaddress.ip_address(own) not in network:
        raise CannotListen(
            f"cannot listen in {host} (--admin-host): expected this machine to have an address in that network, got "
            f"{own or 'no way to it'}"
        )
    return tuple(dict.fromkeys((own, LOOPBACK)))


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


def bind_admin(host: str, port: int) -> list[socket.socket]:
    """A bound socket for each address of ``host``, all on one port. Raises CannotListen."""
    with contextlib.ExitStack() as bound:
        sockets: list[socket.socket] = []
        for address in addresses_of(host):
            sock = bind(address, port, " (--admin-port)")
            port = sock.getsockname()[1]  # where any was free
            sockets.append(bound.enter_context(sock))
        bound.pop_all()
    return sockets


def url_of(sock: socket.socket) -> str:
    """``http://host:port``."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own_address(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str | None:
    """The address from which this machine would send to ``network``; None where it cannot."""
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((str(network[min(1, network.num_addresses - 1)]), _ANY_PORT))  # chooses a route, sends nothing
            own: str = sock.getsockname()[0]
            return own
    except OSError:
        return None
